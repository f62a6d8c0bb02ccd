"""What a run folder's opening removes, and what it leaves alone: files of others, and copies that jobs still write."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxalign import _locks, _runs
from tests.test_run_folders import config, lock

GONE = 2**22 + 5
"""A number that no process has."""


def below(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def written(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.mark.parametrize(
    "names",
    [
        ("readme.txt", ".notes.tmp", "project/.cache.tmp/x", ".work.tmp/thesis.tex"),
        ("readme.txt", ".a.json.tmp", f"a/.model.tmp-{GONE}-abcdefgh/weights"),
        (".notes.tmp",),
        (".work.tmp/thesis.tex",),
        (".work.tmp-1-y.bak/thesis.tex",),
        ("config.json", "model.safetensors", ".config.json.tmp"),
    ],
)
def test_a_folder_that_is_refused_keeps_its_hidden_files(tmp_path, names):
    out = tmp_path / "home"
    written(out, *names)
    before = below(out)
    with pytest.raises(ValueError, match=r"^out: expected a new or empty folder, or one of this run, found files in"):
        _runs.open_run(out, config(out))
    assert below(out) == before


def test_a_run_that_is_refused_keeps_its_hidden_files(tmp_path):
    out = tmp_path / "run"
    with _locks.released():
        _runs.open_run(out, config(out, steps=5))
    written(out, ".metrics.jsonl.tmp", f".model.tmp-{GONE}-abcdefgh/weights")
    before = below(out)
    for change in ({"steps": 4}, {"steps": 5, "learning_rate": 2.0}):
        with pytest.raises(ValueError, match="of the run in"):
            _runs.open_run(out, config(out, **change))
        assert below(out) == before


def test_what_others_write_in_a_run_folder_stays_and_what_a_killed_job_left_goes(tmp_path):
    out = tmp_path / "run"
    with _locks.released():
        _runs.open_run(out, config(out))
    first = below(out)
    others = [".notes.tmp", "notes/.todo.tmp", ".cache.tmp/x", "mine/.work.tmp-old/x", "a/b/.x.json.tmp"]
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock(out / "inner", pid=os.getppid(), started=_locks.started(os.getppid()))
    live = ["inner/.lock", "inner/.x.json.tmp", f"inner/.model.tmp-{GONE}-abcdefgh/w"]
    live += [f"saved/.model.tmp-{sleeper.pid}-abcdefgh/w"]
    left = [".metrics.jsonl.tmp", "rollouts/.00001.npz.tmp", "states/..00000.npy.blake2b.tmp"]
    left += [f".model.tmp-{GONE}-abcdefgh/w", f".model.tmp-{GONE}-abcdefgh.old/w", f"saved/.base.tmp-{GONE}-a_cdefg1/w"]
    written(out, *others, *live[1:], *left)
    try:
        with _locks.released():
            _runs.open_run(out, config(out))
        assert below(out) == sorted([*first, *others, *live])
    finally:
        sleeper.communicate(b"\n")


def test_a_job_that_was_killed_before_its_first_file_had_its_name_begins_again(tmp_path):
    out = tmp_path / "run"
    for name in (".inputs.json.tmp", ".config.json.tmp", ".versions.json.tmp"):
        written(out, name)
        with _locks.released():
            _runs.open_run(out, config(out))
        assert below(out) == ["config.json", "inputs.json", "versions.json"]
        (out / "config.json").unlink()


def test_a_folder_with_a_config_of_others_is_refused_in_words_about_the_folder(tmp_path):
    for name, values in (("hf", {"architectures": ["LlamaForCausalLM"]}), ("other", {"steps": 4}), ("data", ["x"])):
        out = tmp_path / name
        out.mkdir()
        (out / "config.json").write_text(json.dumps(values))
        for later in (False, True):
            with pytest.raises(ValueError, match=rf"^out: expected a new or empty folder, .* found files in {out}"):
                _runs.open_run(out, config(out), later=later)
        assert below(out) == ["config.json"]

"""A run folder's life: what begins it, what it refuses and what not, one job at a time, what a killed one leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from jaxalign import _locks, _runs, models
from jaxalign.models.hf.files import whole_folder
from jaxalign.training import job
from jaxalign.training.options import OptimizerOptions, RunOptions
from tests.conftest import tiny_lm
from train import sft, world

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a test."""

    run: RunOptions
    data: str = ""
    """A file."""
    reward: str = ""
    """A sum of folders and programs."""
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)


def config(out, data="", reward="", **optimizer) -> Config:
    return Config(run=RunOptions(out=str(out)), data=data, reward=reward, optimizer=OptimizerOptions(**optimizer))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a data file, a model's folder and a run of both."""
    root = tmp_path / "a"
    (root / "model").mkdir(parents=True)
    (root / "model/weights").write_text("12")
    (root / "data.jsonl").write_text("[1]\n")
    monkeypatch.chdir(root)
    inputs = ["data.jsonl", "model"]
    _runs.open_run("run", config("run", "data.jsonl", "0.5 * model - module:f", steps=5), inputs=inputs)
    (root / "run/metrics.jsonl").touch()
    yield root
    _locks.release(root / "run")


def whole_model(folder: pathlib.Path) -> None:
    """The files of a model, as far as a finished run is asked for them."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")


def opened(root, data="data.jsonl", reward="0.5 * model - module:f", *, out="run", inputs=None, **optimizer):
    options = config(out, data, reward, **{"steps": 5, **optimizer})
    names = [data, reward.split(" ")[2]] if inputs is None else inputs
    return _runs.open_run(out, options, inputs=names)


def test_what_changes_no_result_is_not_refused(place, monkeypatch, tmp_path):
    opened(place, save_every=7, log_every=3, track="none")
    os.utime("data.jsonl", ns=(0, 1))
    opened(place)
    opened(place, data="./data.jsonl")
    opened(place, data=str(place / "data.jsonl"), reward=f"0.5 * {place}/model - module:f")
    monkeypatch.chdir(tmp_path)
    opened(place, data="a/data.jsonl", reward="0.5 * a/model - module:f", out="a/run")
    assert json.loads((place / "run/config.json").read_text())["data"] == "a/data.jsonl"
    # All of it in another place, with other times: a clone that was moved.
    _locks.release(place / "run")
    place.rename(tmp_path / "b")
    for path in (tmp_path / "b").rglob("*"):
        os.utime(path)
    opened(place, data="b/data.jsonl", reward="0.5 * b/model - module:f", out="b/run")
    _locks.release(tmp_path / "b/run")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1.0}, "learning_rate: expected 0.0001 of the run in run, found 1.0"),
        ({"steps": 4}, "steps: expected 5 of the run"),
        ({"reward": "0.4 * model - module:f"}, "reward: expected '0.5"),
        ({"data": "other.jsonl"}, "data: expected 'data.jsonl'"),
        ({"reward": "0.5 * copy - module:f"}, "reward: expected"),
    ],
)
def test_what_changes_results_is_refused_by_name(place, change, named):
    shutil.copy("data.jsonl", "other.jsonl")
    (place / "copy").mkdir()
    (place / "copy/weights").write_text("13")
    with pytest.raises(ValueError, match=f"^{named}"):
        opened(place, **change)
    opened(place)


def test_two_inputs_that_change_places_are_refused(place):
    for name in ("x", "y"):
        pathlib.Path(name).mkdir()
        pathlib.Path(name, "weights").write_text(name)
    _runs.open_run("two", config("two", "x", "y"), inputs=["x", "y"])
    with pytest.raises(ValueError, match=r"^data: expected 'x'"):
        _runs.open_run("two", config("two", "y", "x"), inputs=["y", "x"])
    _locks.release(place / "two")


def test_an_input_of_other_bytes_is_named(place):
    kept = os.stat("model/weights")
    pathlib.Path("model/weights").write_text("34")
    with pytest.raises(ValueError, match=r"^inputs: .*model/weights"):
        opened(place)
    pathlib.Path("model/weights").write_text("12")
    os.utime("model/weights", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    pathlib.Path("model/more").touch()
    with pytest.raises(ValueError, match=r"^inputs: .*model/more"):
        opened(place)


def test_files_that_another_command_writes_anew_are_no_inputs(place):
    _runs.open_run("reader", config("reader", "run"), inputs=["run"])
    opened(place, save_every=3, track="none")
    _runs.open_run("reader", config("reader", "run"), inputs=["run"])
    _locks.release(place / "reader")


def test_the_librarys_own_files_are_named_from_its_root(place):
    own = str(ROOT / "jaxalign/worlds/opinions.py")
    _runs.open_run("own", config("own"), inputs=[own])
    kept = json.loads((place / "own/inputs.json").read_text())
    assert [row[0] for row in kept["files"]] == ["jaxalign/worlds/opinions.py"]
    assert str(ROOT) not in json.dumps(kept)
    _locks.release(place / "own")


def test_a_folder_from_before_there_were_digests_goes_on(place):
    stamps = {name: [os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in ("data.jsonl", "model/weights")}
    (place / "run/inputs.json").write_text(json.dumps(stamps))
    opened(place)
    (place / "run/inputs.json").write_text(json.dumps(stamps | {"data.jsonl": [3, 5]}))
    with pytest.raises(ValueError, match=r"^inputs: .*data\.jsonl"):
        opened(place)


def test_more_steps_go_on_and_a_finished_run_is_then_not_finished(place, capsys):
    (place / "run/summary.json").write_text("{}")
    whole_model(place / "run/model")
    assert job.finished(opened(place)) == {}
    options = config("run", "data.jsonl", "0.5 * model - module:f", steps=8)
    out = _runs.open_run("run", options, inputs=["data.jsonl", "model"], later=True)
    assert "steps: 8, of which the run in run had 5; the run goes on" in capsys.readouterr().out
    assert job.finished(out) is None
    assert (out / "summary.json").exists()  # nothing is written before the inputs are read
    _runs.begin(out)
    assert not (out / "summary.json").exists()
    assert json.loads((out / "config.json").read_text())["steps"] == 8
    with pytest.raises(ValueError, match=r"^steps: expected 8"):
        opened(place)


def test_a_finished_run_without_its_product_is_told(place):
    (place / "run/summary.json").write_text("{}")
    for product in ("model", "table.npz"):
        with pytest.raises(ValueError, match=rf"^out: expected {product} of the finished run in run, found none; rem"):
            job.finished(pathlib.Path("run"), product=product)


def test_a_finished_run_whose_weights_are_gone_is_told(place):
    out = pathlib.Path("run")
    (out / "summary.json").write_text("{}")
    whole_model(out / "model")
    assert job.finished(out) == {}
    told = r"^out: expected a whole model of the finished run in run, found no {}; remove run/summary.json: "
    (out / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match=told.format("model.safetensors")):
        job.finished(out)
    index = out / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}))
    (out / "model/1.safetensors").touch()
    with pytest.raises(ValueError, match=told.format("2.safetensors")):
        job.finished(out)
    (out / "model/2.safetensors").mkdir()
    with pytest.raises(ValueError, match=told.format("2.safetensors")):
        job.finished(out)
    (out / "model/2.safetensors").rmdir()
    (out / "model/2.safetensors").touch()
    assert job.finished(out) == {}
    for text in ("", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 5000, '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=told.format(f"whole {index.name}")):
            job.finished(out)
    (out / "model/config.json").unlink()
    with pytest.raises(ValueError, match=told.format("config.json")):
        job.finished(out)
    shutil.rmtree(out / "model")
    (out / "model").touch()
    with pytest.raises(ValueError, match=told.format("config.json")):
        job.finished(out)


def test_a_finished_table_without_what_it_was_made_with_is_told(place):
    out = pathlib.Path("run")
    (out / "summary.json").write_text("{}")
    (out / "table.npz").touch()
    with pytest.raises(ValueError, match=r"^out: expected table\.json of the finished run in run, found none; remove"):
        job.finished(out, product="table.npz", beside=("table.json",))
    (out / "table.json").touch()
    assert job.finished(out, product="table.npz", beside=("table.json",)) == {}


def test_a_run_that_diverged_writes_no_model(tmp_path):
    _, params = tiny_lm(0)
    job.check_converged(params, {"loss": 1.0, "rows": 3}, tmp_path)
    for wrong, summary, named in (
        (params, {"validation_loss": float("nan")}, "validation_loss"),
        (params | {"head": jnp.asarray([1.0, jnp.inf])}, {}, "head"),
    ):
        with pytest.raises(FloatingPointError, match=rf"^{named}: .*diverged and no model is written"):
            job.check_converged(wrong, summary, tmp_path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A small world."""
    out = tmp_path_factory.mktemp("life") / "world"
    world.run(world.Config(out=str(out), texts=40, pairs=5, held_out=2, layers=1, width=8))
    return out


def test_a_misspelt_name_leaves_no_folder_and_the_command_mended_runs(texts, tmp_path):
    def command(**change) -> list[str]:
        given = {"data": texts / "texts.jsonl", "architecture": texts / "config.json", "tokenizer": texts / "tokenizer"}
        given |= {
            "max-length": 32,
            "steps": 1,
            "batch-size": 4,
            "track": "none",
            "out": tmp_path / "runs/sft",
            **change,
        }
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    for change in ({"data": texts / "text.jsonl"}, {"architecture": "absent"}, {"tokenizer": "absent"}):
        found = (
            subprocess.run(
                [sys.executable, "-m", "train.sft", *command(**change)], capture_output=True, text=True, check=False
            )
            if "data" in change
            else None
        )
        if found is None:
            with pytest.raises(ValueError, match="absent"), _locks.released():
                sft.main(command(**change))
        else:
            assert found.returncode == 2
            assert len(found.stderr.splitlines()) == 1, found.stderr
        assert not (tmp_path / "runs").exists()
    sft.main(command())
    out = tmp_path / "runs/sft"
    assert not (out / ".lock").exists()
    # Twice as many steps are those of the run with as many from the first, from where it goes on.
    sft.main(command(steps=2))
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    shutil.rmtree(out / "model")
    with pytest.raises(ValueError, match=r"^out: expected model of the finished run"):
        sft.main(command(steps=2))
    (out / "summary.json").unlink()
    sft.main(command(steps=2))
    assert (out / "model/model.safetensors").exists()


# Locks ----------------------------------------------------------------------------------------------------------------


def lock(folder: pathlib.Path, **change) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    found = {"host": socket.gethostname(), "pid": 1, "started": _locks.started(1), "time": 1.7e9, "made": 0} | change
    (folder / ".lock").write_text(json.dumps(found) + "\n")
    return folder


def test_a_folder_in_use_is_refused_in_one_line_that_names_the_process(tmp_path):
    out = lock(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"^out: expected a folder that no other job writes to, found .* in use by pro"
    ):
        _runs.open_run(out, config(out))
    assert sorted(p.name for p in out.iterdir()) == [".lock"]
    other = lock(tmp_path / "other", host="another", pid=os.getpid())
    with pytest.raises(ValueError, match=rf"process {os.getpid()} on another since .*remove {other}/\.lock"):
        _runs.open_run(other, config(other))


@pytest.mark.parametrize("change", [{"pid": 2**22 + 5}, {"pid": os.getpid(), "started": 5}, {"host": "another"}])
def test_the_lock_of_a_process_that_is_gone_is_taken_over_and_told(tmp_path, capsys, change):
    out = lock(tmp_path / "run", **change)
    if "host" in change:
        os.utime(out / ".lock", (time.time() - 900, time.time() - 900))
    with _locks.released():
        _runs.open_run(out, config(out))
        assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
    assert "which is gone, is passed over" in capsys.readouterr().err
    assert not (out / ".lock").exists()
    assert not list(out.glob(".lock*"))


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path):
    out = lock(tmp_path / "run", pid=2**22 + 5)
    program = (
        "import sys, time, pathlib\nfrom jaxalign import _locks\n"
        "try:\n    _locks.take(pathlib.Path(sys.argv[1])); print('got'); time.sleep(4)\n"
        "except ValueError: print('refused')"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(4)
    ]
    found = sorted(process.communicate(timeout=60)[0].strip() for process in started)
    assert found == ["got", "refused", "refused", "refused"]
    assert not list(out.glob(".lock*"))


def test_a_finished_folder_can_be_read_while_it_is_locked(place):
    (place / "run/summary.json").write_text("{}")
    whole_model(place / "run/model")
    _locks.release(place / "run")
    lock(place / "run")
    assert job.finished(opened(place)) == {}
    assert (place / "run/.lock").exists()
    lock(place / "run", pid=2**22 + 5)
    assert job.finished(opened(place)) == {}
    assert not (place / "run/.lock").exists()


def test_a_lock_of_this_process_is_taken_again_and_given_back_with_the_empty_folder(tmp_path):
    out = tmp_path / "runs/a"
    with _locks.released():
        _locks.take(out)
        with _locks.released():
            _locks.take(out)
        assert (out / ".lock").exists()
    assert not (tmp_path / "runs").exists()


# What a killed job leaves ---------------------------------------------------------------------------------------------


def test_hidden_copies_of_killed_saves_are_removed(tmp_path):
    program = (
        "import os, sys\nfrom jaxalign.models.hf.files import whole_folder\n"
        "with whole_folder(sys.argv[1], overwrite=True) as t:\n    (t / 'x').write_text('x'); os.kill(os.getpid(), 9)"
    )
    target, out = tmp_path / "run/model", tmp_path / "run"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, str(target)], check=False, cwd=ROOT)
    assert len(list(out.iterdir())) == 1  # the second has removed what the first had left
    (out / ".metrics.jsonl.tmp").touch()
    mine = out / f".model.tmp-{os.getpid()}-x"
    mine.mkdir()
    with whole_folder(target, overwrite=True) as temporary:
        (temporary / "weights").touch()
    assert sorted(p.name for p in out.iterdir()) == sorted([".metrics.jsonl.tmp", mine.name, "model"])
    shutil.rmtree(target)
    (out / ".metrics.jsonl.tmp").touch()
    with _locks.released():
        shutil.rmtree(mine)
        (out / ".model.tmp-1-y").mkdir()
        _runs.open_run(out, config(out))
        assert sorted(p.name for p in out.iterdir()) == [".lock", "config.json", "inputs.json", "versions.json"]


def test_a_folder_that_was_killed_between_two_names_gets_its_name_back(tmp_path):
    lm, params = tiny_lm(0)
    models.save(tmp_path / "model", lm, params)
    (tmp_path / "model").rename(tmp_path / f".model.tmp-{2**22 + 5}-x.old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "model", overwrite=True):
        raise RuntimeError
    assert jax.tree.structure(models.load(tmp_path / "model")[1]) == jax.tree.structure(params)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

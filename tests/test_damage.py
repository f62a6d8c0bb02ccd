"""What is damaged on disk is passed over or named: checkpoints, JSON, roll-outs, tables, responses; the one writer."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import _io, _runs
from jaxalign.evaluation import engine, results
from jaxalign.training import checkpoints, hidden_states, job, law_sources, rollouts, tables
from jaxalign.training.options import ModelOptions

ROOT = pathlib.Path(__file__).parent.parent


class State(NamedTuple):
    """A state with a step."""

    step: Any
    params: Any


def state(step: int) -> State:
    return State(jnp.asarray(step), {"w": jnp.arange(2000.0) + step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the steps 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with checkpoints.open_checkpoints(folder, keep=3) as manager:
        for step in (3, 6, 9):
            checkpoints.save(manager, state(step), {"seed": 0, "step": step})
    return folder


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in (folder / "9").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


def without_digests(folder: pathlib.Path) -> None:
    for path in folder.glob("*/digests.json"):
        path.unlink()


def empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def folder_in_place(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def link_in_place(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def without(path: pathlib.Path, item: str) -> None:
    """Drops what digests.json says of an item."""
    kept = {name: digest for name, digest in json.loads(path.read_text()).items() if not name.startswith(item)}
    path.write_text(json.dumps(kept))


CHECKPOINTS = {  # what is done to the folder -> the step that is gone on from
    "nothing": (lambda f: None, 9),
    "a flipped bit of the largest file": (lambda f: flip(largest(f)), 6),
    "the largest file cut": (lambda f: cut(largest(f)), 6),
    "metadata empty": (lambda f: (f / "9/state/_METADATA").write_text(""), 6),
    "the position cut": (lambda f: (f / "9/data/metadata").write_text("{"), 6),
    "a file missing": (lambda f: (f / "9/data/metadata").unlink(), 6),
    "digests cut": (lambda f: cut(f / "9/digests.json"), 6),
    "digests a folder": (lambda f: folder_in_place(f / "9/digests.json"), 6),
    "digests a link to nothing": (
        lambda f: ((f / "9/digests.json").unlink(), (f / "9/digests.json").symlink_to("x")),
        6,
    ),
    "no digests in it, and a flipped bit": (lambda f: (flip(largest(f)), (f / "9/digests.json").write_text("{}")), 6),
    "no digests of the state": (lambda f: (flip(largest(f)), without(f / "9/digests.json", "state")), 6),
    "a file in the way of the damaged one": (lambda f: (flip(largest(f)), (f / "damaged-9").touch()), 6),
    "a link in the way of the damaged one": (lambda f: (flip(largest(f)), (f / "damaged-9").symlink_to("x")), 6),
    "an earlier damaged one": (lambda f: (flip(largest(f)), shutil.copytree(f / "6", f / "damaged-9")), 6),
    "an earlier link to nothing": (lambda f: (shutil.rmtree(f / "3"), (f / "3").symlink_to("x")), 9),
    "an empty folder": (lambda f: empty(f / "9"), 6),
    "a stray folder": (lambda f: (f / "12").mkdir(), 9),
    "a stray file": (lambda f: (f / "12").touch(), 9),
    "a folder of another name": (lambda f: (f / "12.copy").mkdir(), 9),
    "orbax's notes empty": (lambda f: (f / "9/_CHECKPOINT_METADATA").write_text(""), 9),
    "of old, whole": (without_digests, 9),
    "of old, metadata cut": (lambda f: (without_digests(f), cut(f / "9/state/_METADATA")), 6),
    "of old, the position empty": (lambda f: (without_digests(f), (f / "9/data/metadata").write_text("")), 6),
    "two": (lambda f: (flip(largest(f)), empty(f / "6")), 3),
    "all": (lambda f: [empty(f / name) for name in "369"], None),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_checkpoint_is_passed_over_and_told(saved, tmp_path, capsys, name):
    damage, step = CHECKPOINTS[name]
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    damage(folder)
    capsys.readouterr()
    with checkpoints.open_checkpoints(folder, keep=3) as manager:
        found = checkpoints.restore(manager, state(0), {"seed": 0})
        told = capsys.readouterr().out
        if step is None:
            assert found is None
            assert "no whole checkpoint is left" in told
        else:
            assert found is not None
            assert found[1] == step
            np.testing.assert_array_equal(found[0].params["w"], state(step).params["w"])
        if step != 9 or "stray folder" in name:
            assert "damaged (" in told
            assert f"goes on from step {step}" in told or step is None
            assert list(folder.glob("damaged-*"))
        else:
            assert told == ""
        checkpoints.save(manager, state(9), {"seed": 0, "step": 9})  # the step that was damaged can be saved again
        manager.wait_until_finished()
        assert manager.latest_step() == 9
    assert checkpoints.damage(folder / "9") == ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("3", "9", "12") for kind in ("file", "link to nothing")),
        *((name, "link to a folder") for name in ("9", "12")),
    ],
)
def test_what_has_the_name_of_a_checkpoint_and_is_none_is_not_in_its_way(saved, tmp_path, name, kind):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / name, ignore_errors=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    if kind == "file":
        (folder / name).write_text("mine")
    else:
        (folder / name).symlink_to(tmp_path / ("mine" if kind == "link to a folder" else "nothing"))
    with checkpoints.opened(folder, keep=2) as manager:
        found = checkpoints.restore(manager, state(0), {"seed": 0})
        assert found is not None
        assert found[1] == (6 if name == "9" else 9)
        for step in (9, 12, 15):
            checkpoints.save(manager, state(step), {"seed": 0, "step": step})
            checkpoints.finish(manager)
    assert [checkpoints.damage(folder / step) for step in ("12", "15")] == ["", ""]
    assert {p.name for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()} == {"12", "15"}
    assert (tmp_path / "mine/thesis.tex").exists()


def test_a_whole_checkpoint_of_another_run_is_refused_and_not_set_aside(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for wrong, position, named in (
        (State(jnp.asarray(0), {"w": jnp.zeros(3)}), {"seed": 0}, "params/w: expected"),
        (state(0), {"seed": 1}, "data: expected"),
    ):
        with (
            checkpoints.open_checkpoints(folder, keep=3) as manager,
            pytest.raises(ValueError, match=named),
        ):
            checkpoints.restore(manager, wrong, position)
    assert not list(folder.glob("damaged-*"))


@pytest.mark.parametrize("text", ["", "  \n", '{"seed": 1, "st', "[1]", "\x00\x00", "[" * 5000])
def test_a_damaged_json_of_a_run_folder_is_named_with_what_to_do(tmp_path, text):
    from tests.test_command import Config, Place

    config = Config(place=Place(out="x"))
    for name, call in (
        ("config.json", lambda out: _runs.open_run(out, config)),
        ("inputs.json", lambda out: _runs.open_run(out, config)),
        ("versions.json", lambda out: _runs.open_run(out, config)),
        ("summary.json", job.finished),
        ("table.json", tables.read_about),
        ("laws.json", lambda out: law_sources._about(str(out))),
    ):
        out = tmp_path / name.partition(".")[0]
        _runs.open_run(out, config)
        (out / name).write_text(text)
        with pytest.raises(ValueError, match=rf"^{name}: expected .* found .* in {out}/{name}; \w") as found:
            call(out)
        assert "\n" not in str(found.value)
        _runs.release(out)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_an_architecture_that_cannot_be_read_is_named(tmp_path, monkeypatch, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    monkeypatch.setattr(job.models, "tokenizer", lambda name, chat_template: object())
    with pytest.raises(ValueError, match=rf"^config\.json: expected .*, found .* in {path}"):
        job.start(
            ModelOptions(architecture=str(path), tokenizer="t"),
            lambda config: None,
            seed=0,
            dtype="float32",
            max_length=8,
        )


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "00001.npz"
    rows = {"index": np.arange(3), "tokens": np.ones((3, 4), np.int32), "length": np.ones(3, int)}
    _io.write_arrays(path, rows | {"reward": np.ones(3), "prompts": "d"})
    return path


def test_roll_outs_and_their_digest(shard):
    found = _io.read_arrays(shard, ("index", "reward"), then="x")
    assert set(found) == {"index", "tokens", "length", "reward", "prompts"}
    np.savez(shard, index=np.arange(3), reward=np.ones(3))  # from before there were digests
    assert set(_io.read_arrays(shard, ("index", "reward"), then="x")) == {"index", "reward"}


def test_a_damaged_shard_of_roll_outs_is_named(shard):
    whole = shard.read_bytes()
    rewritten = dict(np.load(shard)) | {"reward": np.zeros(3)}
    np.savez(shard, **rewritten)
    other = shard.read_bytes()
    np.savez(shard, index=np.arange(3))
    lacks = shard.read_bytes()
    objects = np.asarray([None])
    np.savez(shard, index=objects, reward=objects)
    for data in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], b"x" * 300, other, lacks, shard.read_bytes()):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match=r"^00001\.npz: expected the arrays .* in .*00001\.npz; remove") as found:
            rollouts._read(shard, [], "d", "prompts")
        assert "pickle" not in str(found.value)
    bits = 0
    for place in range(0, len(whole), 97):  # a bit anywhere: it is named, or it changes no number
        data = bytearray(whole)
        data[place] ^= 4
        shard.write_bytes(data)
        try:
            found = _io.read_arrays(shard, ("index", "reward"), then="x")
            np.testing.assert_array_equal(found["tokens"], np.ones((3, 4), np.int32))
        except ValueError as error:
            assert str(error).startswith("00001.npz: ")  # noqa: PT017
            bits += 1
    assert bits > 3


def test_a_table_is_checked_when_it_is_read(tmp_path):
    about = dict.fromkeys(tables.MEANING, "x")
    reward = np.sort(np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32))
    tables.write(tmp_path, tables.Table(reward, about))
    np.testing.assert_array_equal(tables.read(tmp_path, about, rows=6).reward, reward)
    infinite, unsorted = reward.copy(), reward.copy()
    infinite[2, 3], unsorted[4] = np.inf, reward[4, ::-1]
    for wrong, words in (
        (reward[:2], r"shape \(6, 4\)"),
        (reward[0], r"shape \(6, 4\)"),
        (reward[:, :3], r"shape \(6, 4\)"),
        (unsorted, "ascending order, found others in row 4"),
        (infinite, "finite rewards, found others in row 2"),
        (reward.astype(int), "a float type"),
    ):
        _io.write_arrays(tmp_path / tables.REWARDS, {"reward": wrong})
        with pytest.raises(ValueError, match=rf"^calibration: expected .*{words}"):
            tables.read(tmp_path, about, rows=6)
    flip(tmp_path / tables.REWARDS)
    with pytest.raises(ValueError, match=r"^table\.npz: "):
        tables.read(tmp_path, about, rows=6)
    (tmp_path / tables.REWARDS).unlink()
    with pytest.raises(ValueError, match=r"^calibration: expected table\.npz"):
        tables.read(tmp_path, about, rows=6)


def test_responses_that_have_changed_are_named(tmp_path):
    path = tmp_path / "responses.jsonl"
    records = [{"method": "base", "index": i} for i in range(3)]
    results.write(path, records)
    assert results.read(path) == records
    text = path.read_text()
    for changed in (text.replace('"index": 1', '"index": 2'), text[:-20], "", text + text):
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"^responses\.jsonl: .* another digest"):
            results.read(path)
    results.write(path, records, partial=True)
    _io.sidecar(path).unlink()
    for changed in (text.replace("}\n", "\n", 1), "é\n" + text, "[]\n" + text):
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"^responses\.jsonl: expected a JSON object in line 1"):
            results.read(path)
    path.write_text(text[:-5])  # a last line that was cut short
    assert results.read(path) == records[:2]


def test_partial_files_that_a_kill_has_left_beside_whole_responses_go(tmp_path):
    """Between the responses file's own name and the removal of what it is made of."""
    final = tmp_path / "responses.jsonl"
    for name in ("", ".partial", ".partial-00001"):
        (tmp_path / f"responses.jsonl{name}").write_text("{}\n")
    nothing = engine.Texts([], [], None)
    assert engine.decode([], {}, nothing, final, batch_size=1, mesh="", seed=0) == {}
    assert list(tmp_path.iterdir()) == [final]


def test_a_damaged_shard_of_hidden_states_is_named(tmp_path):
    path = tmp_path / "00000.npy"
    with _io.whole_file(path) as sink:
        np.save(sink, np.ones((4, 2), np.uint32))
    whole = path.read_bytes()
    assert hidden_states._mapped(path, 4, np.dtype(np.float32)).shape == (4, 2)
    for data in (b"", whole[:40], whole[:-3]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"^states: expected .* {path}; remove"):
            hidden_states._mapped(path, 4, np.dtype(np.float32))


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, calls = tmp_path / "x.json", []
    fsync, replace = os.fsync, pathlib.Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(pathlib.Path, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    _io.write_json(path, {"a": 1})
    assert calls == ["fsync", "rename", "fsync"]  # the file, its name, the folder
    with pytest.raises(TypeError), _io.whole_file(path) as sink:
        sink.write("half of a text")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def writers(source: str) -> list[str]:
    """Calls of a program that write or rename files by themselves."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        words = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        opens = name == "open" and any(isinstance(w, str) and w in ("w", "wb", "x", "xb") for w in words)
        alone = name == "replace" and len(node.args) == 1 and not node.keywords  # Path.replace
        if opens or alone or name in ("write_text", "write_bytes", "save_file", "savez", "savefig"):
            owner = ast.unparse(node.func)
            first = ast.unparse(node.args[0]) if node.args else ""
            if not owner.startswith("_io.") and first != "sink":
                found.append(f"{node.lineno} {owner}")
    return found


def test_every_writer_is_the_one_writer():
    assert writers("p.write_text('x')\np.open('wb')\nt.replace(p)\n_io.write_text(p, 'x')\ntext.replace('a', 'b')") == [
        "1 p.write_text",
        "2 p.open",
        "3 t.replace",
    ]
    own = {  # the writer itself, locks, /dev/null, files inside a folder that takes its name when it is whole
        "eval/bench/shapes.py",
        "jaxalign/_hosts.py",
        "jaxalign/_io.py",
        "jaxalign/_locks.py",
        "jaxalign/models/hf/files.py",
        "jaxalign/models/hf/peft.py",
        "jaxalign/models/hf/writing.py",
        "jaxalign/training/checkpoints.py",
        "jaxalign/worlds/smollm2.py",
    }
    found = {}
    for top in ("jaxalign", "train", "eval"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name not in own and (calls := writers(path.read_text())):
                found[name] = calls
    assert found == {}

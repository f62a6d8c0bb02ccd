"""What train.regress keeps of its best parameters: after kills, damage and more steps."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import time

import pytest

from jaxalign import _io, _locks, training
from jaxalign.training import checkpoints
from tests.test_train_regress import command
from tests.test_train_rl import files
from train import distil, regress

__all__ = ["files"]  # a fixture

OFTEN = ("--check-every", "1", "--save-every", "1", "--track", "none")
RUNS = {
    "better at each reading": (*OFTEN, "--beta", "0.3", "--transform", "exp:3", "--steps", "3"),
    "ended by patience": (*OFTEN, "--beta", "1", "--steps", "9", "--learning-rate", "0.3", "--patience", "1"),
    "ended between saves": (
        *("--beta", "1", "--steps", "9", "--learning-rate", "0.3", "--patience", "2"),
        *("--check-every", "1", "--save-every", "2", "--track", "none"),
    ),
}

ENDED = ("ended by patience", "ended between saves")


def left(out: pathlib.Path) -> tuple[bytes, list[dict], dict]:
    """Weights, metrics without speeds, and summary."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if "second" not in name} for row in lines]
    return (out / "model/model.safetensors").read_bytes(), rows, json.loads((out / "summary.json").read_text())


def run(files, out: pathlib.Path, *more: str) -> tuple[bytes, list[dict], dict]:
    with _locks.released():
        regress.main(command(files, *more, "--out", str(out)))
    return left(out)


@pytest.fixture
def copies(monkeypatch, tmp_path) -> list[pathlib.Path]:
    """The run folder as it is each time that best.json has been written: what a kill there leaves."""
    found: list[pathlib.Path] = []
    write, seal = _io.write_own_json, checkpoints._seal_written

    def write_and_copy(path: pathlib.Path, values) -> None:
        write(path, values)
        if path.name == "best.json" and tmp_path / "whole" in path.parents:
            found.append(tmp_path / f"killed-{len(found)}")
            with contextlib.suppress(shutil.Error):  # what is being saved changes its names
                shutil.copytree(tmp_path / "whole", found[-1])
            (found[-1] / ".lock").unlink(missing_ok=True)

    monkeypatch.setattr(_io, "write_own_json", write_and_copy)
    monkeypatch.setattr(checkpoints, "_seal_written", lambda folder: (time.sleep(0.1), seal(folder))[1])
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name == "ended by patience")) for name in RUNS]
)
def test_a_run_that_is_killed_once_best_json_is_written_goes_on_to_the_same_bytes(name, files, tmp_path, copies):
    whole = run(files, tmp_path / "whole", *RUNS[name])
    assert name not in ENDED or whole[2]["steps"] < 9
    assert len(copies) > 2
    for copy in (copies[0], copies[-2]):
        assert run(files, copy, *RUNS[name]) == whole, copy


def test_a_run_that_is_stopped_at_the_reading_that_ends_it_takes_its_last_step(files, tmp_path, monkeypatch):
    """Between two saves the metrics of that step are read one step later."""
    more = (*RUNS["ended between saves"], "--save-every", "5")
    whole, write = run(files, tmp_path / "whole", *more), _io.write_own_json

    def write_and_stop(path: pathlib.Path, values) -> None:
        write(path, values)
        if path.name == "best.json" and values["stop"] and not values["ended"]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_io, "write_own_json", write_and_stop)
    with pytest.raises(training.Stopped):
        run(files, tmp_path / "stopped", *more)
    monkeypatch.setattr(_io, "write_own_json", write)
    assert whole[2]["steps"] == 3
    assert run(files, tmp_path / "stopped", *more) == whole


def damage(out: pathlib.Path, how: str) -> None:
    """Does something to what a run keeps."""
    step = json.loads((out / "best.json").read_text())["step"]
    if how == "no best.json":
        (out / "best.json").unlink()
    elif how == "another step":
        (out / f"best/{step}").rename(out / "best/1")
    else:
        path = max((p for p in (out / f"best/{step}/state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def test_a_round_whose_best_parameters_are_lost_is_fitted_again_to_the_same_bytes(files, tmp_path, capsys):
    more = (*RUNS["better at each reading"], "--steps", "4")
    whole = run(files, tmp_path / "whole", *more)
    for i, how in enumerate(("a flipped bit", "another step", "no best.json")):
        out = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", out)
        (out / "summary.json").unlink()
        damage(out, how)
        capsys.readouterr()
        assert run(files, out, *more) == whole, how
        told = capsys.readouterr().out
        assert told.count("the round is fitted again") == 1, told


DAMAGED = (
    *("", "{", "[]", "null", '{"ended": true}', '{"step": 1, "read": 1, "since": 0, "loss": 0.5}'),
    '{"step": "1", "read": 1, "since": 0, "stop": false, "loss": 0.5}',
    '{"step": 3, "read": 1, "since": 0, "stop": false, "loss": 0.5}',
    '{"step": 1, "read": 1, "since": 0, "stop": false, "loss": null}',
)


def test_a_damaged_best_json_is_named_in_one_line(files, tmp_path):
    run(files, tmp_path, *RUNS["better at each reading"])
    (tmp_path / "summary.json").unlink()
    for text in DAMAGED:
        (tmp_path / "best.json").write_text(text)
        with pytest.raises(ValueError, match=r"^best\.json: expected .*, found .*best\.json; remove it") as told:
            run(files, tmp_path, *RUNS["better at each reading"])
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["better at each reading", "ended by patience"])
def test_a_run_goes_on_with_more_steps(name, files, tmp_path):
    before = run(files, tmp_path / "run", *RUNS[name])[2]["steps"]
    _, rows, summary = run(files, tmp_path / "run", *RUNS[name], "--steps", "12")
    assert summary["steps"] > before
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    if name not in ENDED:
        assert len(rows) == summary["steps"] == 12


@pytest.mark.parametrize("more", [("--beta", "0.5", "--refresh", "2"), ("--transform", "exp:3", "--target-kl", "0.05")])
def test_a_run_of_several_rounds_is_not_prolonged(more, files, tmp_path):
    given = (*more, "--refresh-samples", "2", "--steps", "2")
    whole = run(files, tmp_path / "run", *given)
    with pytest.raises(
        ValueError, match=r"^steps: expected 2 of the run in .*run, whose policy has drawn .*, found 4; name another"
    ):
        run(files, tmp_path / "run", *given, "--steps", "4")
    assert run(files, tmp_path / "run", *given) == whole


def test_a_table_that_lacks_a_shard_is_named_and_nothing_is_written_into_it(files, tmp_path):
    table = tmp_path / "table"
    shutil.copytree(files / "table", table)
    (table / "rollouts/00001.npz").unlink()
    given = ("--model", str(files / "base/model"), "--calibration", str(table), "--n", "2", "--steps", "1")
    distilled = [*given, "--max-length", "64", "--batch-size", "2", "--out", str(tmp_path / "distil")]
    aligned = command(files, "--beta", "1", "--table", str(table), "--out", str(tmp_path / "regress"))
    fresh = command(files, "--beta", "1", "--fresh", str(table), "--out", str(tmp_path / "fresh"))
    for name, main, words in (
        ("calibration", distil.main, distilled),
        ("table", regress.main, aligned),
        ("fresh", regress.main, fresh),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected all 3 shards in .*rollouts, found none of .*00001"):
            main(words)
        assert not (table / "rollouts/00001.npz").exists()

"""A training job and its folder: what is finished is reported, what goes on is the same run, all else is refused."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

from jaxalign import _options, commands, models
from jaxalign.data import encoded, preferences, tokenizers
from jaxalign.data.text_options import TextOptions
from jaxalign.training import objectives, options
from jaxalign.training.training_job import Job
from tests.conftest import tiny_lm

ROWS = [encoded.TextTokens([2, 3], [4 + i, 1], f"row {i}", str(i)) for i in range(4)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A script's options."""

    run: options.RunOptions
    note: str = ""
    """Its own."""
    model: options.ModelOptions = dataclasses.field(default_factory=options.ModelOptions)
    rows: options.RowOptions = dataclasses.field(
        default_factory=functools.partial(options.RowOptions, max_length=8, validation=0.0)
    )
    optimizer: options.OptimizerOptions = dataclasses.field(
        default_factory=functools.partial(options.OptimizerOptions, steps=2, batch_size=2)
    )
    mesh: options.MeshOptions = dataclasses.field(default_factory=options.MeshOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tokenizers.word_level(["the", "cat", "sat", "on", "a", "mat"])
    lm, params = tiny_lm(0, num_layers=1, vocab_size=len(tokenizer), eos_ids=(1,))
    models.save(folder / "model", lm, params, tokenizer=tokenizer)
    return str(folder / "model")


def opened(base, out, **changed) -> Job:
    config = commands.from_fields(Config, {"out": str(out), "model": base} | changed)
    return Job.open(config, stage="test", following=lambda folder: f"next {folder}")


def collate(rows):
    return preferences.pad_texts(rows, length=8)


def finish(job: Job) -> dict:
    started = job.start(lambda _: None)
    data = job.split(encoded.Loaded(ROWS, 0, []))
    params = job.fit(started, data, objectives.language_model(started.lm), collate)
    count = job.evaluate(lambda _, batch: batch["loss_mask"].sum(-1), params, data.train, collate)
    return job.finish(started, params, data, {"tokens": int(count.sum())})


def test_a_finished_folder_is_reported_and_another_run_is_refused_by_option(base, tmp_path, capsys):
    out = tmp_path / "run"
    job = opened(base, out)
    assert job.finished() is None
    summary = finish(job)
    assert summary == {"rows": 4, "validation_rows": 0, "skipped_rows": 0, "tokens": 8}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert opened(base, out).finished() == json.loads((out / "summary.json").read_text()) == summary
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"wrote {out / 'model'} and {out / 'summary.json'}; next: next {out}"
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for name, value in (
        ("learning_rate", 0.5),
        ("note", "x"),
        ("system", "Be brief."),
        ("seed", 1),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected .* of the run in .*, found {value!r}"):
            opened(base, out, **{name: value})
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert opened(base, out, mesh="data=1").finished() == summary  # a run may go on on other devices


def test_a_job_that_failed_goes_on_as_the_same_run(base, tmp_path):
    finish(opened(base, tmp_path / "whole", save_every=1))
    stopped = opened(base, tmp_path / "stopped", save_every=1)
    started, data = stopped.start(lambda _: None), stopped.split(encoded.Loaded(ROWS, 0, []))
    calls: list[int] = []

    def fails_at_the_second(rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise ValueError("the second batch")
        return collate(rows)

    with pytest.raises(ValueError, match="the second batch"):
        stopped.fit(started, data, objectives.language_model(started.lm), fails_at_the_second)
    again = opened(base, tmp_path / "stopped", save_every=1)
    assert again.finished() is None
    finish(again)
    one, two = (models.load(tmp_path / name / "model")[1]["transformer"] for name in ("whole", "stopped"))
    assert np.array_equal(one["embedding"], two["embedding"])


def test_options_that_are_wrong_open_no_folder(base, tmp_path):
    wrong = {
        "epochs": 0.0,
        "learning_rate": float("inf"),
        "clip": -1.0,
        "weight_decay": -1.0,
        "warmup": 1.0,
        "validation": -0.1,
        "steps": -1,
        "batch_size": 0,
        "save_every": 0,
        "log_every": 0,
        "max_length": 1,
        "accumulate": 3,
        "model": "",
        "tokenizer": "x",
        "columns": "x",
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            opened(base, tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


def test_micro_batches_divide_the_rows_of_a_step(base, tmp_path):
    config = commands.from_fields(Config, {"out": str(tmp_path / "run"), "model": base, "accumulate": 3})
    with pytest.raises(ValueError, match=r"^accumulate: expected a divisor of batch_size 2, found 3"):
        Job.open(config, stage="test", following=str)
    assert Job.open(config, stage="test", following=str, rows_per_step=6).config is config


def test_the_length_of_a_run_is_steps_or_epochs():
    assert options.OptimizerOptions(steps=7).steps_for(1000) == 7
    assert options.OptimizerOptions(epochs=1.5, batch_size=32).steps_for(100) == 5
    assert options.OptimizerOptions(batch_size=32).steps_for(0) == 1


@pytest.mark.parametrize(
    "job", ["arm", "calibrate", "distil", "dpo", "regress", "reward_model", "rl", "sft", "shaping", "value"]
)
def test_a_scripts_config_has_each_option_once_and_is_made_of_groups(job):
    config = commands.load(job).Config
    assert config.__bases__ == (object,)
    defaults = _options.defaults(config)
    assert {"seed", "dtype", "config", "columns", "show"} <= set(defaults)
    given = {"out": "x", "data": "x", "base": "x", "prompts": "x", "reward": "x", "calibration": "x", "table": "x"}
    made = commands.from_fields(config, {k: v for k, v in given.items() if k in _options._options(config)})
    assert commands.from_fields(config, _options.flat(made)) == made
    hash(made)

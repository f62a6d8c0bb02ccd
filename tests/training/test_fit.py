"""The loop: resuming bit for bit after an interruption, SIGTERM and kill -9; NaN; metrics; hooks."""

from __future__ import annotations

import io
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import _progress, training
from jaxalign.data import batches
from jaxalign.training import logging as lines

PROGRAM = """
    import os, pathlib, signal, sys, time
    import jax, jax.numpy as jnp, numpy as np, optax
    from jaxalign import training
    from jaxalign.data import batches

    ROWS = [np.random.default_rng(i).normal(size=3).astype(np.float32) for i in range(10)]

    def loss(params, batch, frozen):
        error = batch["x"] @ params["w"] - params["b"]
        return (error**2).mean(), training.LossAux(jnp.asarray(len(batch["x"])), {})

    def run(out, steps=12, slow=0.0, save_every=4):
        optimizer = optax.adam(0.1)
        inner = training.train_step(loss, optimizer)

        def step(state, batch, frozen):
            time.sleep(slow)
            return inner(state, batch, frozen)

        state = training.create({"w": jnp.ones(3), "b": jnp.zeros(())}, optimizer)
        collate = lambda rows: {"x": np.stack(rows), "mask": np.ones((len(rows), 3), bool)}
        source = batches.batches(ROWS, collate, batch_size=4, seed=3, accumulate=2)
        return training.fit(step, state, source, steps=steps, out=pathlib.Path(out), stage="test",
                            position={"seed": 3}, save_every=save_every, log_every=1)
"""
exec(compile(textwrap.dedent(PROGRAM), "program", "exec"))


def same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, final state) of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)  # noqa: F821


def losses_of(out: pathlib.Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines.read(out / "metrics.jsonl")]


def child(code: str, *arguments: str, **options) -> subprocess.Popen:
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_run_that_goes_on_is_the_uninterrupted_one(whole, tmp_path):
    folder, final = whole

    class Power(BaseException):
        """An end without a save, as of the current; before an error of the program the run saves."""

    source = batches.batches

    def failing(*args, **kwargs):
        start = source(*args, **kwargs)

        def iterate(step):
            for i, batch in enumerate(start(step), start=step):
                if i == 6:
                    raise Power
                yield batch

        return iterate

    batches.batches = failing
    try:
        with pytest.raises(Power):
            run(tmp_path)  # noqa: F821
    finally:
        batches.batches = source
    assert [step for step, _ in losses_of(tmp_path)] == [1, 2, 3, 4, 5]
    resumed = run(tmp_path)  # noqa: F821
    same(resumed, final)
    assert losses_of(tmp_path) == losses_of(folder)
    same(run(tmp_path), final)  # noqa: F821  # a finished run is read, not trained further


def test_sigterm_saves_says_so_and_exits_with_143(whole, tmp_path):
    process = child("run(sys.argv[1], slow=0.2)", str(tmp_path))
    deadline = time.time() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len(losses_of(tmp_path)) < 2:
        assert time.time() < deadline
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err[-2000:]
    assert "stopped at step" in out
    assert "the same command goes on" in out
    stopped = len(losses_of(tmp_path))
    assert stopped < 12
    same(run(tmp_path), whole[1])  # noqa: F821
    assert losses_of(tmp_path) == losses_of(whole[0])


@pytest.mark.parametrize("where", ["batches", "step", "hook"])
def test_an_error_is_raised_when_the_state_before_it_is_saved(whole, tmp_path, monkeypatch, capsys, where):
    source, train_step = batches.batches, training.train_step

    def wrong(i, step):
        if i == step:
            raise RuntimeError("no such reward")

    def failing(*args, **kwargs):
        start = source(*args, **kwargs)
        return lambda step: (wrong(i, 6) or batch for i, batch in enumerate(start(step), start=step))

    def failing_step(*args, **kwargs):
        inner = train_step(*args, **kwargs)
        return lambda state, *rest: wrong(int(state.step), 6) or inner(state, *rest)

    if where == "batches":
        monkeypatch.setattr(batches, "batches", failing)
    if where == "step":
        monkeypatch.setattr(training, "train_step", failing_step)
    if where == "hook":
        write = lines.MetricWriter.write
        monkeypatch.setattr(lines.MetricWriter, "write", lambda self, i, m: wrong(i, 6) or write(self, i, m))
    with pytest.raises(RuntimeError, match="no such reward"):
        run(tmp_path, save_every=5)  # noqa: F821
    monkeypatch.undo()
    step = 5 if where == "hook" else 6  # the metrics of step 6 could not be written: its state is not whole
    assert training.latest_step(training.open_checkpoints(tmp_path / "checkpoints")) == step
    assert ("saved at step 6 before an error" in capsys.readouterr().out) == (step == 6)
    same(run(tmp_path), whole[1])  # noqa: F821
    assert losses_of(tmp_path) == losses_of(whole[0])


def test_a_progress_line_that_cannot_be_written_ends_no_run(whole, tmp_path, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = lambda self: self.write("")  # noqa: E731
        isatty = lambda self: False  # noqa: E731

    monkeypatch.setattr(sys, "stderr", Full())
    same(run(tmp_path), whole[1])  # noqa: F821
    monkeypatch.setattr(sys, "stderr", None)
    same(run(tmp_path), whole[1])  # noqa: F821


def test_a_run_whose_folder_is_removed_ends_and_does_not_make_it_again(tmp_path, monkeypatch):
    out, write = tmp_path / "run", lines.MetricWriter.write

    def remove_at_6(self, step, metrics):
        write(self, step, metrics)
        if step == 6:
            shutil.rmtree(out)

    monkeypatch.setattr(lines.MetricWriter, "write", remove_at_6)
    with pytest.raises(FileNotFoundError, match=f"^out: {out} is gone"):
        run(out, save_every=100)  # noqa: F821
    assert not out.exists()


KILLED = """
    # Killed where the third checkpoint's temporary folder would get its name.
    import os
    saved = []
    for name in ("rename", "replace"):
        inner = getattr(os, name)
        def renamed(source, target, *args, inner=inner, **kwargs):
            if str(target).rstrip("/").endswith("checkpoints/9"):
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(source, target, *args, **kwargs)
        setattr(os, name, renamed)
    from pathlib import Path
    for name in ("rename", "replace"):
        inner = getattr(Path, name)
        def moved(self, target, inner=inner):
            if str(target).endswith("checkpoints/9"):
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(self, target)
        setattr(Path, name, moved)
    run(sys.argv[1], save_every=3)
"""


def test_kill_9_in_the_middle_of_a_save_loses_nothing_that_was_saved(whole, tmp_path):
    process = child(KILLED, str(tmp_path))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert "9" not in names
    assert any("9" in name for name in names), names  # the save had begun
    assert training.latest_step(training.open_checkpoints(tmp_path / "checkpoints")) == 6
    same(run(tmp_path, save_every=3), whole[1])  # noqa: F821
    assert losses_of(tmp_path) == losses_of(whole[0])
    left = [path.name for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]
    assert left == []


@pytest.mark.parametrize("wait", [0.0, 0.3, 0.7])
def test_kill_9_at_any_time(whole, tmp_path, wait):
    process = child("run(sys.argv[1], slow=0.1, save_every=1)", str(tmp_path))
    deadline = time.time() + 120
    while not (tmp_path / "metrics.jsonl").exists() or not losses_of_or_none(tmp_path):
        assert time.time() < deadline
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    time.sleep(wait)
    process.kill()
    process.communicate()
    same(run(tmp_path), whole[1])  # noqa: F821
    assert losses_of(tmp_path) == losses_of(whole[0])


def losses_of_or_none(out: pathlib.Path):
    try:
        return losses_of(out)
    except json.JSONDecodeError:  # a line that is being written
        return None


def test_nan_stops_the_run_and_names_the_step(tmp_path):
    """The checkpoint that stays is from before it."""
    optimizer = optax.sgd(0.1)

    def loss(params, batch, frozen):
        return (params["w"] * batch["x"]).sum(), training.LossAux(jnp.ones(()), {})

    step = training.train_step(loss, optimizer)
    values = np.ones(10, np.float32)
    values[6] = np.nan

    def source(start):
        return iter({"x": values[i].reshape(1, 1)} for i in range(start, 10))

    state = training.create({"w": jnp.ones(1)}, optimizer)
    with pytest.raises(FloatingPointError, match=r"'loss': nan.* at step 7; the last checkpoint is from before it"):
        training.fit(step, state, source, steps=10, out=tmp_path, stage="test", position={}, save_every=2, log_every=1)
    assert training.latest_step(training.open_checkpoints(tmp_path / "checkpoints")) == 6
    assert all(np.isfinite(loss) for _, loss in losses_of(tmp_path))


def test_other_data_under_a_checkpoint_is_refused(tmp_path):
    run(tmp_path, steps=4)  # noqa: F821
    state = training.create({"w": jnp.ones(3), "b": jnp.zeros(())}, optax.adam(0.1))
    with pytest.raises(ValueError, match=r"data: expected .* as the checkpoint .* was made with"):
        training.fit(None, state, None, steps=8, out=tmp_path, stage="test", position={"seed": 4})


def test_metrics_are_lines_and_events(whole):
    out, _ = whole
    found = lines.read(out / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 13))
    assert {"loss", "grad_norm", "tokens_per_second"} <= set(found[0])
    assert list((out / "tensorboard").glob("events*"))


def test_progress_is_whole_lines_in_a_pipe(tmp_path):
    process = child("run(sys.argv[1])", str(tmp_path))
    _, err = process.communicate(timeout=120)
    shown = [line for line in err.splitlines() if line.startswith("test:")]
    assert "\\r" not in repr(err)
    assert "12/12" in shown[-1]
    assert "loss" in shown[-1]
    assert "tokens/s" in shown[-1]


def test_a_pipe_gets_a_line_a_minute(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with _progress.progress("job", 900, unit="row") as bar:
        for _ in range(900):
            bar.update(1)
    lines = pipe.getvalue().splitlines()
    assert "0/900" in lines[0]
    assert "900/900" in lines[-1]
    assert bar.mininterval == 60
    assert len(lines) <= 3


# Hooks ----------------------------------------------------------------------------------------------------------------


def by_hand(out=None, *, steps=12, donate=True, **options):
    """A run of `PROGRAM`'s loss with hooks; without a folder by default."""
    optimizer = optax.adam(0.1)
    step = training.train_step(loss, optimizer, donate=donate)  # noqa: F821
    start = training.create({"w": jnp.ones(3), "b": jnp.zeros(())}, optimizer)
    collate = lambda rows: {"x": np.stack(rows), "mask": np.ones((len(rows), 3), bool)}  # noqa: E731
    source = batches.batches(ROWS, collate, batch_size=4, seed=3, accumulate=2)  # noqa: F821
    return start, training.fit(step, start, source, steps=steps, out=out, **options)


def test_a_run_without_a_folder_is_that_with_one_and_leaves_its_start_alive(whole):
    start, final = by_hand()
    same(final, whole[1])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(start))


def test_hooks_see_every_step_the_metrics_and_the_checkpoints(whole, tmp_path):
    seen = {"steps": [], "metrics": [], "saves": []}
    hook = training.Hooks(
        after_step=lambda step, state: seen["steps"].append((step, int(state.step))),
        on_metrics=lambda step, metrics: seen["metrics"].append((step, metrics["loss"])),
        on_save=lambda step, state: seen["saves"].append((step, int(state.step))),
    )
    by_hand(tmp_path, hooks=[hook], save_every=5, log_every=1)
    assert seen["steps"] == [(i, i) for i in range(1, 13)]
    assert seen["metrics"] == losses_of(tmp_path) == losses_of(whole[0])
    assert seen["saves"] == [(5, 5), (10, 10), (12, 12)]


def test_a_stop_condition_ends_the_run_saved(tmp_path):
    hook = training.Hooks(stop=lambda step, metrics: step == 3 and metrics["loss"] > 0)
    _, state = by_hand(tmp_path, hooks=[hook, training.Hooks()])
    assert int(state.step) == 4  # the metrics of step 3 are read while step 4 runs
    assert training.latest_step(training.open_checkpoints(tmp_path / "checkpoints")) == 4


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (print, "hooks: expected a sequence of training.Hooks, found builtin_function_or_method"),
        ([print], "hooks: expected a sequence of training.Hooks, found builtin_function_or_method at 0"),
        (training.Hooks(), "hooks: expected a sequence of training.Hooks, found Hooks"),
        ([training.Hooks(on_save=3)], "hooks: expected a function as on_save, found int"),
        ([training.Hooks(stop=lambda step, metrics: None)], "hooks: expected True or False of stop, found NoneType"),
    ],
)
def test_hooks_of_another_form_are_named(hooks, message):
    with pytest.raises(ValueError, match=message):
        by_hand(hooks=hooks)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda state: state, r"step: expected \(state, metrics by name\), found \["),
        (lambda state: (state, 1.0), r"step: expected \(state, metrics by name\), found \['TrainState', 'float'\]"),
        (lambda state: (state, {"a": jnp.ones(2)}), r"step: expected metrics of shape \(\), found \{'a': \(2,\)\}"),
    ],
)
def test_a_step_of_another_form_is_named(result, message):
    state = training.create({"w": jnp.ones(3)}, optax.sgd(0.1))
    source = lambda start: iter([{"x": np.ones((1, 1))}] * 3)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        training.fit(lambda state, batch, frozen: result(state), state, source, steps=2)
    with pytest.raises(ValueError, match=r"state: expected a field step \[\]"):
        training.fit(lambda state, batch, frozen: (state, {}), {"w": 1}, source, steps=2)

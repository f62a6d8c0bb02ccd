"""The one training loop."""

from __future__ import annotations

import contextlib
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, _progress, _signals
from jaxalign._programs import tells_programs
from jaxalign.training import checkpoints
from jaxalign.training.flops import Work
from jaxalign.training.hooks import Hooks, check_hooks, stops
from jaxalign.training.logging import MetricWriter
from jaxalign.training.step import Batch
from jaxalign.types import Params

S = TypeVar("S")


class StepFunction(Protocol[S]):
    """What `fit` repeats: `train_step`'s result, or a function of one's own."""

    def __call__(self, state: S, batch: Batch, frozen: Params) -> tuple[S, Mapping[str, Any]]:
        """One step.

        Args:
          state: a tree with a field `step` that counts the steps taken.
          batch: the next of the batches.
          frozen: what `fit` was given.

        Returns:
          (state, metrics): scalars by name. "tokens" adds to the count of tokens and is not logged; nor is "flops",
            which adds to the operations where `fit` was given `work`.
        """


@tells_programs
def fit(
    step: StepFunction[S],
    state: S,
    batches: Callable[[int], Iterator[Batch]],
    *,
    steps: int,
    out: pathlib.Path | None = None,
    stage: str = "train",
    position: dict[str, Any] | None = None,
    frozen: Params = None,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    hooks: Sequence[Hooks] = (),
    work: Work | None = None,
    donate: bool = False,
    save_every: int = 200,
    log_every: int = 10,
    keep: int = 2,
    track: str = "tensorboard",
) -> S:
    """Runs `step` until `steps` optimizer steps are taken; goes on from the newest checkpoint in out/checkpoints.

    Metrics are read one step late, so that the device never waits for the host. A batch's tokens are its real ones
    ("mask" leaves), or those of the metric "tokens". On SIGTERM, SIGHUP and Ctrl-C the state is saved, and
    `training.Stopped` (exit code 143 or 129) or KeyboardInterrupt is raised; a second Ctrl-C ends the process at once.
    An error of a step, of the batches or of a hook is raised when the state before it has been saved.

    Args:
      step: as `train_step` makes it; it may donate its state.
      state: at step 0; a `TrainState`, or any tree whose field `step` counts what `steps` does. Restored arrays are
        placed on devices as these are.
      batches: batches(i) iterates over the batches from optimizer step i on, a function of i alone: an interrupted run
        that goes on is then the uninterrupted one, bit for bit.
      steps: optimizer steps in all.
      out: folder of checkpoints/, metrics.jsonl and tensorboard/; None: nothing is written.
      stage: name on the progress line and in messages.
      position: what names the data (JSON values: seed, rows, batch size); kept in the checkpoint and compared.
      frozen: passed to every step.
      place: puts a batch on its devices.
      hooks: called after steps, with metrics, with checkpoints, and to end the run early.
      work: what a step has to do, and the peak of the devices: the metrics then hold "tflops_per_second", operations
        by formula, and "mfu", their share of the peak.
      donate: pass `state` itself to the first step. By default that is a copy, so that the caller's arrays stay when
        `step` donates. A state that is donated is gone as well where a checkpoint takes its place.
      save_every: optimizer steps between checkpoints.
      log_every: optimizer steps between lines of metrics.jsonl.
      keep: checkpoints that stay.
      track: where the metrics go beside metrics.jsonl: "tensorboard", "wandb", "trackio" or "none".

    Returns:
      The last state.

    Raises:
      ValueError: a state without `step`, hooks or metrics of another form, a checkpoint made on other data.
      FloatingPointError: a metric that is not finite, with the step's number; the last checkpoint is from before it.
      FileNotFoundError: the run folder has been removed.
    """
    check_hooks(hooks)
    taken: Any = getattr(state, "step", None)
    if taken is None or jnp.shape(taken) != ():
        raise ValueError(f"state: expected a field step [], as training.create makes it, found {type(state).__name__}")
    position = position or {}
    with contextlib.ExitStack() as stack:
        several = _hosts.count() > 1
        stack.enter_context(_signals.deferred())
        manager = stack.enter_context(checkpoints.opened(out / "checkpoints", keep=keep)) if out else None
        restored = checkpoints.restore(manager, state, position) if manager else None
        start = int(_hosts.host_value(taken)) if restored is None else restored[1]
        if restored is not None:
            if donate:
                jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, state)
            state = restored[0]
        elif not donate:
            state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)
        if start >= steps:
            return state
        bar = stack.enter_context(_progress.progress(stage, steps, initial=start, unit="step"))

        def show(step: int, metrics: Mapping[str, float]) -> None:
            bar.set_postfix_str(_shown(metrics), refresh=False)

        own = [Hooks(on_metrics=show)]
        if manager is not None and out is not None:
            writer, kept, where = stack.enter_context(MetricWriter(out, step=start, track=track)), manager, position

            def save(step: int, state: Any) -> None:
                checkpoints.save(kept, state, where | {"step": step})

            own = [Hooks(on_metrics=writer.write, on_save=save), *own]
        every = [*own, *hooks]
        reader = _Reader(stage, every, steps, log_every, work)
        source = batches(start)
        pending: tuple[int, Mapping[str, jax.Array], _Counts] | None = None
        done, stop, ended = start, False, False
        place_of = None if out is None else out.stat().st_ino
        answer: Callable[[], bool] = lambda: False  # noqa: E731
        read = True  # whether the metrics of all steps but the last have been read

        def save_all() -> None:
            _check_there(out, place_of, stage)
            for hook in every:
                if hook.on_save is not None:
                    hook.on_save(done, state)

        try:
            while done < steps and not stop:
                batch = next(source)
                counts = reader.count(batch)
                state, values = _outcome(step(state, place(batch), frozen))
                done += 1
                before, pending = pending, (done, values, counts)
                for hook in every:
                    if hook.after_step is not None:
                        hook.after_step(done, state)
                if before is not None:
                    read = False
                    stop, read = reader.read(*before), True
                    bar.update(1)
                asked = _signals.asked() > 0
                if several:  # all stop after the same step: that at which they know what each knew a step ago
                    known, answer = answer, _hosts.begin_any(asked)
                    asked = known()
                ended, stop = ended or asked, stop or asked
                if stop or done % save_every == 0 or done == steps:
                    now, pending, read = pending, None, False
                    stop, read = reader.read(*now) or stop, True
                    bar.update(1)
                    save_all()
        except Exception as error:
            _check_there(out, place_of, stage)
            if read and manager is not None and not several and done > start:
                _save_before(error, manager, lambda: reader.read(*pending) if pending else None, save_all, stage, done)
            raise
        if manager is not None:
            checkpoints.finish(manager)
        if ended and done < steps:
            print(f"{stage}: stopped at step {done} of {steps}, saved; the same command goes on from here", flush=True)
            _signals.stop(told=True, number=_signals.asked() or signal.SIGTERM)
        return state


def _check_there(out: pathlib.Path | None, number: int | None, stage: str) -> None:
    """FileNotFoundError where a run folder has been removed; a save that was under way may have made it again."""
    if out is not None and not (out.is_dir() and out.stat().st_ino == number):
        raise FileNotFoundError(f"out: {out} is gone: it was removed while {stage} wrote to it") from None


def _save_before(
    error: Exception, manager: Any, read: Callable[[], Any], save: Callable[[], None], stage: str, done: int
) -> None:
    """Saves the last whole state of a run that an error ends, where its metrics are finite and it can be saved."""
    try:
        read()
        save()
        checkpoints.finish(manager)
    except Exception:  # the error that was first is told
        return
    print(f"{stage}: saved at step {done} before an error; the same command goes on from here", flush=True)


def _outcome(found: tuple[S, Mapping[str, Any]]) -> tuple[S, Mapping[str, Any]]:
    """What a step gave, where it is a state and metrics."""
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
        kinds = [type(x).__name__ for x in found] if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"step: expected (state, metrics by name), found {kinds}")
    return found


class _Counts(NamedTuple):
    """What a batch holds."""

    tokens: int
    """Real tokens."""
    flops: float
    """Operations of its step; 0 where they are not asked for."""


class _Reader:
    """Metrics on the host: finite, with tokens per second, given to the hooks."""

    def __init__(
        self, stage: str, hooks: Sequence[Hooks], steps: int, log_every: int, work: Work | None = None
    ) -> None:
        self.stage, self.hooks, self.steps, self.log_every, self.work = stage, hooks, steps, log_every, work
        self.tokens, self.flops, self.since = 0, 0.0, time.perf_counter()

    def count(self, batch: Batch) -> _Counts:
        """What a host batch holds, which is added once its step has been taken."""
        return _Counts(real_tokens(batch), 0.0 if self.work is None else self.work.flops(batch))

    def read(self, taken: int, values: Mapping[str, Any], counts: _Counts) -> bool:
        """Reads the metrics of a step; whether a hook ends the run."""
        if wrong := {name: jnp.shape(value) for name, value in values.items() if jnp.shape(value) != ()}:
            raise ValueError(f"step: expected metrics of shape (), found {wrong}")
        host = {name: float(value) for name, value in _hosts.host_value(dict(values)).items()}
        self.tokens += counts.tokens + int(host.pop("tokens", 0))
        self.flops += counts.flops + (0.0 if self.work is None else host.pop("flops", 0.0))
        bad = {name: value for name, value in host.items() if not math.isfinite(value)}
        if bad:
            raise FloatingPointError(f"{self.stage}: {bad} at step {taken}; the last checkpoint is from before it")
        answers = [stops(hook, taken, host) for hook in self.hooks]  # each hook is asked, whatever the others say
        if taken % self.log_every == 0 or taken in (1, self.steps):
            now = time.perf_counter()
            host["tokens_per_second"] = self.tokens / (now - self.since)
            if self.work is not None:
                done = self.flops / (now - self.since)
                host |= {"tflops_per_second": done / 1e12, "mfu": done / self.work.peak}
            self.tokens, self.flops, self.since = 0, 0.0, now
            for hook in self.hooks:
                if hook.on_metrics is not None:
                    hook.on_metrics(taken, host)
        return any(answers)


def _shown(values: Mapping[str, float]) -> str:
    shown = [f"{name} {values[name]:.4f}" for name in ("loss", "reward", "kl") if name in values]
    return ", ".join([*shown, f"{values['tokens_per_second']:.0f} tokens/s"])


def real_tokens(batch: Batch) -> int:
    """Real tokens of a host batch: the True entries of its leaves named "mask"."""
    named = jax.tree_util.tree_leaves_with_path(batch)
    return sum(int(np.sum(leaf)) for path, leaf in named if getattr(path[-1], "key", None) == "mask")

"""The one training loop."""

from __future__ import annotations

import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from jaxalign import _progress
from jaxalign.training import checkpoints
from jaxalign.training.logging import MetricWriter
from jaxalign.training.step import Batch
from jaxalign.types import Params

S = TypeVar("S")


class Stopped(SystemExit):
    """The run was asked to stop (SIGTERM) and has saved: exit code 0."""


def fit(
    step: Callable[[S, Batch, Params], tuple[S, dict[str, Any]]],
    state: S,
    batches: Callable[[int], Iterator[Batch]],
    *,
    steps: int,
    out: pathlib.Path,
    stage: str,
    position: dict[str, Any],
    frozen: Params = None,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    save_every: int = 200,
    log_every: int = 10,
    keep: int = 2,
) -> S:
    """Runs `step` until `steps` optimizer steps are taken; goes on from the newest checkpoint in out/checkpoints.

    Args:
      step: as `train_step` makes it; the state is donated.
      state: at step 0; a `TrainState`, or any tree whose field `step` counts what `steps` does. Its arrays' places are
        those of the restored ones.
      batches: batches(i) iterates over the batches from optimizer step i on, a function of i alone: so an interrupted
        run that goes on is the uninterrupted one, bit for bit.
      position: what names the data (JSON values: seed, rows, batch size); kept in the checkpoint and compared.
      frozen: passed to every step.
      place: puts a batch on its devices.
      save_every, log_every: optimizer steps between checkpoints, and between lines of metrics.jsonl.

    Metrics are read one step late, so that the device never waits for the host. A batch's tokens are its real ones
    ("mask" leaves), or those of the metric "tokens". On SIGTERM the state is saved and `Stopped` (exit code 0) is
    raised.

    Raises:
      FloatingPointError: a metric that is not finite, with the step's number; the last checkpoint is from before it.
    """
    with checkpoints.open_checkpoints(out / "checkpoints", keep=keep) as manager, _Signal() as asked:
        restored = checkpoints.restore(manager, state, position)
        start = 0
        if restored is not None:
            state, start = restored
        if start >= steps:
            return state
        source = batches(start)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        done, tokens, begin = start, 0, time.perf_counter()
        with (
            MetricWriter(out, step=start) as writer,
            _progress.progress(stage, steps, initial=start, unit="step") as bar,
        ):

            def read(taken: int, values: dict[str, jax.Array]) -> None:
                nonlocal tokens, begin
                host = {name: float(value) for name, value in values.items()}
                tokens += int(host.pop("tokens", 0))
                bad = {name: value for name, value in host.items() if not math.isfinite(value)}
                if bad:
                    raise FloatingPointError(f"{stage}: {bad} at step {taken}; the last checkpoint is from before it")
                if taken % log_every == 0 or taken in (1, steps):
                    now = time.perf_counter()
                    host["tokens_per_second"] = tokens / (now - begin)
                    tokens, begin = 0, now
                    writer.write(taken, host)
                    shown = [f"{name} {host[name]:.4f}" for name in ("loss", "reward", "kl") if name in host]
                    shown.append(f"{host['tokens_per_second']:.0f} tokens/s")
                    bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update(1)

            while done < steps:
                batch = next(source)
                tokens += real_tokens(batch)
                state, values = step(state, place(batch), frozen)
                done += 1
                if pending is not None:
                    read(*pending)
                pending = done, values
                if asked.stop or done % save_every == 0 or done == steps:
                    read(*pending)
                    pending = None
                    checkpoints.save(manager, state, position | {"step": done})
                if asked.stop:
                    break
        manager.wait_until_finished()
        if done < steps:
            print(f"{stage}: stopped at step {done} of {steps}, saved; the same command goes on from here", flush=True)
            raise Stopped(0)
        return state


def real_tokens(batch: Batch) -> int:
    """Real tokens of a host batch: the True entries of its leaves named "mask"."""
    named = jax.tree_util.tree_leaves_with_path(batch)
    return sum(int(np.sum(leaf)) for path, leaf in named if getattr(path[-1], "key", None) == "mask")


class _Signal:
    """Notes SIGTERM instead of dying by it, inside a with block of the main thread."""

    def __init__(self) -> None:
        self.stop = False
        self._former: Any = None

    def __enter__(self) -> _Signal:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.stop = True

    def __exit__(self, *_: Any) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)

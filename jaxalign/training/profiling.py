"""A trace of a few steps of a run by jax's profiler, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from jaxalign import _hosts
from jaxalign.training.hooks import Hooks

FOLDER = "profile"
WARM_UP = 3
"""Steps before the trace: the first compile, and the metrics of a step are read while the next one runs."""


@contextlib.contextmanager
def traced(out: pathlib.Path, steps: int) -> Iterator[tuple[Hooks, ...]]:
    """The hooks of a run that trace some of its steps.

    Args:
      out: the run folder; the first process writes profile/ in it.
      steps: how many steps are traced, after `WARM_UP` of this start of the run; 0 for none. A run that ends before
        leaves the trace of fewer, or none, which is printed.
    """
    if not steps or not _hosts.is_first():
        yield ()
        return
    calls, running = 0, False

    def after_step(step: int, state: Any) -> None:
        nonlocal calls, running
        calls += 1
        if calls == WARM_UP:
            jax.block_until_ready(state)  # type: ignore[no-untyped-call, unused-ignore]
            jax.profiler.start_trace(str(out / FOLDER))
            running = True
        elif running and calls == WARM_UP + steps:
            jax.block_until_ready(state)  # type: ignore[no-untyped-call, unused-ignore]
            jax.profiler.stop_trace()
            running = False

    try:
        yield (Hooks(after_step=after_step),)
    finally:
        if running:
            jax.profiler.stop_trace()
        if calls < WARM_UP + steps:
            traced_steps = max(calls - WARM_UP, 0)
            print(f"profile: {traced_steps} of {steps} steps traced, since this start took {calls}", flush=True)

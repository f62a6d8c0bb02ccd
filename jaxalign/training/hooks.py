"""What a run of `training.fit` may call beside its steps: a NamedTuple of functions, each left out by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class AfterStep(Protocol):
    """Called after each step."""

    def __call__(self, step: int, state: Any) -> None:
        """Args:
        step: optimizer steps taken.
        state: the new state. The next step may take its memory: copy what is kept.
        """


class OnMetrics(Protocol):
    """Called with the metrics that are logged."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Args:
        step: the optimizer step that they are of.
        metrics: finite numbers by name, "tokens_per_second" among them.
        """


class OnSave(Protocol):
    """Called where a checkpoint is due: at every `save_every`-th step, at the last, and where a run is stopped."""

    def __call__(self, step: int, state: Any) -> None:
        """Args:
        step: optimizer steps taken.
        state: what is saved. The next step may take its memory: copy what is kept.
        """


class StopCondition(Protocol):
    """Decides whether a run ends before its last step."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Args:
          step: the optimizer step that the metrics are of.
          metrics: finite numbers by name.

        Returns:
          True to end the run. The metrics of a step are read while the next one runs, so that one is the last.
        """


class Hooks(NamedTuple):
    """What a run calls beside its steps. `training.fit` takes any number of these."""

    after_step: AfterStep | None = None
    """After each step, before its metrics are known."""
    on_metrics: OnMetrics | None = None
    """With the metrics of every `log_every`-th step, the first and the last."""
    on_save: OnSave | None = None
    """With each checkpoint."""
    stop: StopCondition | None = None
    """With the metrics of every step; True ends the run, saved."""


def check_hooks(hooks: Any) -> None:
    """ValueError for what is not a sequence of `Hooks` whose fields can be called."""
    for i, hook in enumerate(hooks if isinstance(hooks, list | tuple) and not isinstance(hooks, Hooks) else [hooks]):
        if not isinstance(hook, Hooks) or isinstance(hooks, Hooks):
            raise ValueError(f"hooks: expected a sequence of training.Hooks, found {type(hook).__name__} at {i}")
        for name, f in hook._asdict().items():
            if f is not None and not callable(f):
                raise ValueError(f"hooks: expected a function as {name}, found {type(f).__name__} at {i}")


def stops(hook: Hooks, step: int, metrics: Mapping[str, float]) -> bool:
    """Whether a hook ends the run. ValueError for an answer other than True and False."""
    if hook.stop is None:
        return False
    answer = hook.stop(step, metrics)
    if not isinstance(answer, bool | np.bool_):
        raise ValueError(f"hooks: expected True or False of stop, found {type(answer).__name__} at step {step}")
    return bool(answer)

"""Builders of Policies, Critics, Rewards and losses, cached by value: the same call twice gives the same object, so
that a jitted function that takes it as a static argument is traced once (law 6)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MAXSIZE = 512  # kept objects per builder: closures over configurations, never over arrays


def cached(builder: Callable[P, T]) -> Callable[P, T]:
    """Makes a builder give the same object for equal arguments.

    A call with an argument that is not hashable (a list of critics, an array) builds anew, as without the cache.

    Args:
      builder: a function without side effects; 1 and 1.0 are different arguments.

    Returns:
      A function of the same signature, which keeps the `MAXSIZE` results used last.
    """
    kept = functools.lru_cache(maxsize=MAXSIZE, typed=True)(builder)

    @functools.wraps(builder)
    def build(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            hash((args, tuple(kwargs.values())))
        except TypeError:
            return builder(*args, **kwargs)
        return kept(*args, **kwargs)  # type: ignore[arg-type]  # just seen to be hashable

    return build

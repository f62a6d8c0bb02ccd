"""Inference-time procedures that look at ranks alone: what is finally emitted, as a reweighting of quantiles.

A procedure P is calibrated when P(pi)(y) = pi(y)·g(s), s the quantile of y's reward under pi itself, ∫_0^1 g = 1: g
says which quantiles it favours, G(s) = ∫_0^s g is the law of the emitted quantile. Source: InfAlign, arXiv 2412.19792.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from jaxalign.types import Array


class OfQuantile(Protocol):
    """A function of quantiles s [...] in [0, 1] -> [...]."""

    def __call__(self, s: Array, /) -> Array: ...


class Procedure(NamedTuple):
    """An inference-time procedure that looks at ranks alone, as a reweighting of quantiles [...] in [0, 1]."""

    density: OfQuantile
    """g, how much it favours each quantile; its integral is 1."""
    cumulative: OfQuantile
    """G, with G(0) = 0, G(1) = 1 and G' = g."""


def none() -> Procedure:
    """Gives the policy itself: g = 1, G = s.

    Returns:
      A Procedure.
    """
    return _NONE


@functools.cache
def best_of(n: int) -> Procedure:
    """Gives the best of N independent draws: g = N·s^(N−1), G = s^N.

    Args:
      n: N >= 1.

    Returns:
      A Procedure; the same N gives the same object.

    Raises:
      ValueError: no whole number of at least 1.
    """
    _check(n)
    return Procedure(lambda s: n * s ** (n - 1), lambda s: s**n)


@functools.cache
def worst_of(n: int) -> Procedure:
    """Gives the worst of N independent draws: g = N·(1 − s)^(N−1), G = 1 − (1 − s)^N.

    Args:
      n: N >= 1.

    Returns:
      A Procedure; the same N gives the same object.

    Raises:
      ValueError: no whole number of at least 1.
    """
    _check(n)
    return Procedure(lambda s: n * (1 - s) ** (n - 1), lambda s: 1 - (1 - s) ** n)


_NONE = Procedure(jnp.ones_like, lambda s: s)


def _check(n: int) -> None:
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise ValueError(f"n: expected a whole number of at least 1, found {n}")

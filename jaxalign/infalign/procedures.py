"""Inference-time procedures that look at ranks alone: what is finally emitted, as a reweighting of quantiles.

A procedure P is calibrated when P(pi)(y) = pi(y)·g(s), s the quantile of y's reward under pi itself, ∫_0^1 g = 1: g
says which quantiles it favours, G(s) = ∫_0^s g is the law of the emitted quantile. Source: InfAlign, arXiv 2412.19792.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxalign.types import Array


class Procedure(NamedTuple):
    """density: g, and cumulative: G with G(0) = 0, G(1) = 1 and G' = g, on quantiles [...] in [0, 1]."""

    density: Callable[[Array], Array]
    cumulative: Callable[[Array], Array]


def none() -> Procedure:
    """The policy itself: g = 1, G = s."""
    return _NONE


@functools.cache
def best_of(n: int) -> Procedure:
    """The best of N independent draws: g = N·s^(N−1), G = s^N. The same N gives the same object. ValueError for
    N < 1."""
    _check(n)
    return Procedure(lambda s: n * s ** (n - 1), lambda s: s**n)


@functools.cache
def worst_of(n: int) -> Procedure:
    """The worst of N independent draws: g = N·(1 − s)^(N−1), G = 1 − (1 − s)^N. ValueError for N < 1."""
    _check(n)
    return Procedure(lambda s: n * (1 - s) ** (n - 1), lambda s: 1 - (1 - s) ** n)


_NONE = Procedure(jnp.ones_like, lambda s: s)


def _check(n: int) -> None:
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise ValueError(f"n: expected a whole number of at least 1, found {n}")

"""Resampling schemes of `decoding.smc`, and rules for when to resample: functions to pass.

A scheme gives the ancestors of a population from its weights. All of them are unbiased: a particle with share p of the
mass has N·p children in the mean, and one without mass has none (where any has mass). They differ in how much the
number of children varies: systematic and stratified least, residual less than multinomial.
"""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxalign._checks import check_rng
from jaxalign.types import Array

__all__ = [
    "Resampling",
    "ResamplingRule",
    "always",
    "effective_size",
    "ess_below",
    "multinomial",
    "never",
    "residual",
    "stratified",
    "systematic",
    "systematic_at",
]


class Resampling(Protocol):
    """Ancestors [B,N] of log-weights [B,N], which need not be normalised. rng [B]: a key per prompt, consumed."""

    def __call__(self, rng: Array, log_weight: Array) -> Array: ...


class ResamplingRule(Protocol):
    """Whether each prompt is resampled before token t [] is drawn: [B] bool of log-weights [B,N] and ess_threshold [B],
    a number of the decoder's params."""

    def __call__(self, t: Array, log_weight: Array, ess_threshold: Array) -> Array: ...


# When ----------------------------------------------------------------------------------------------------------------


def effective_size(log_weight: Array) -> Array:
    """(Σw)²/Σw² [...] of log-weights [...,N]: N for equal ones, 1 where one has all the mass, 0 where none has any."""
    weight = _relative(log_weight)
    total, squares = weight.sum(axis=-1), (weight**2).sum(axis=-1)
    return jnp.where(squares == 0, 0, total**2 / jnp.where(squares == 0, 1, squares))


def ess_below(t: Array, log_weight: Array, ess_threshold: Array) -> Array:
    """Where the effective sample size is below ess_threshold·N."""
    del t
    return effective_size(log_weight) < ess_threshold * log_weight.shape[-1]


def always(t: Array, log_weight: Array, ess_threshold: Array) -> Array:
    """At every step: the bootstrap particle filter."""
    del t, ess_threshold
    return jnp.ones(log_weight.shape[:1], bool)


def never(t: Array, log_weight: Array, ess_threshold: Array) -> Array:
    """At no step: importance sampling."""
    del t, ess_threshold
    return jnp.zeros(log_weight.shape[:1], bool)


# Schemes --------------------------------------------------------------------------------------------------------------


def systematic(rng: Array, log_weight: Array) -> Array:
    """One uniform number per prompt places N equidistant points: ⌊N·p⌋ or ⌈N·p⌉ children of a share p."""
    return systematic_at(log_weight, _uniform(rng))


def systematic_at(log_weight: Array, uniform: Array) -> Array:
    """`systematic` with the uniform numbers [B] in [0,1) given."""
    n = log_weight.shape[-1]
    return _at(log_weight, (jnp.arange(n) + uniform[:, None]) / n)


def stratified(rng: Array, log_weight: Array) -> Array:
    """One uniform number in each of N equal parts of the mass: the number of children is within 2 of N·p."""
    n = log_weight.shape[-1]
    return _at(log_weight, (jnp.arange(n) + _uniform(rng, n)) / n)


def multinomial(rng: Array, log_weight: Array) -> Array:
    """N independent draws by the weights."""
    return _at(log_weight, _uniform(rng, log_weight.shape[-1]))


def residual(rng: Array, log_weight: Array) -> Array:
    """⌊N·p⌋ children of each particle for certain, and the rest of the N by independent draws in proportion to what is
    left of N·p."""
    n = log_weight.shape[-1]
    weight = _relative(log_weight)
    total = weight.sum(axis=-1, keepdims=True)
    expected = n * weight / jnp.where(total == 0, 1, total)
    certain = jnp.floor(expected)
    ends = jnp.cumsum(certain, axis=-1)
    place = jnp.arange(n, dtype=ends.dtype)
    fixed = jax.vmap(functools.partial(jnp.searchsorted, side="right"), in_axes=(0, None))(ends, place)
    drawn = _at(jnp.log(expected - certain), _uniform(rng, n))
    # Where no mass is left over, every place is taken for certain.
    return jnp.where(place < ends[:, -1:], fixed, drawn).astype(jnp.int32)


def _uniform(rng: Array, *shape: int) -> Array:
    check_rng(rng, per_row=True)
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(rng)


def _at(log_weight: Array, place: Array) -> Array:
    """The particle [B,N] that holds each place [B,N] in [0,1) of the cumulated mass."""
    weight = _relative(log_weight)
    cumulative = jnp.cumsum(weight, axis=-1)
    target = place * cumulative[:, -1:]
    index = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(cumulative, target)
    last = jnp.where(weight > 0, jnp.arange(weight.shape[-1]), 0).max(axis=-1, keepdims=True)
    return jnp.minimum(index, last).astype(jnp.int32)


def _relative(log_weight: Array) -> Array:
    """Weights up to a common factor, the largest 1; all 0 where no weight has mass."""
    top = log_weight.max(axis=-1, keepdims=True)
    return jnp.exp(log_weight - jnp.where(top == -jnp.inf, 0, top))

"""Where a segment ends: rules to pass to `decoding.cards` and `decoding.ggro`."""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp

from jaxalign._arrays import is_supported
from jaxalign.types import Array, StepOutput

__all__ = ["SegmentRule", "entropy", "entropy_reaches", "top_probability_below"]


class SegmentRule(Protocol):
    """Rows [B] whose segment ends before the next token, which is to be drawn from output; threshold [B]: the
    decoder's params["entropy_threshold"]."""

    def __call__(self, output: StepOutput, threshold: Array) -> Array: ...


def entropy(log_prob: Array) -> Array:
    """−Σ_z pi(z)·log pi(z) [...] of log_prob [...,V], in nats; 0·log 0 = 0."""
    inside = is_supported(log_prob)
    finite = jnp.where(inside, log_prob, 0)
    # Rounding may leave a little less than 0 of a distribution that is certain.
    return jnp.maximum(-jnp.where(inside, jnp.exp(finite) * finite, 0).sum(axis=-1), 0)


def entropy_reaches(output: StepOutput, threshold: Array) -> Array:
    """Where the policy's predictive entropy is at least threshold [nats]."""
    return entropy(output.log_prob) >= threshold


def top_probability_below(output: StepOutput, threshold: Array) -> Array:
    """Where the most probable token's surprisal −log pi(z) is at least threshold [nats]: a cheaper measure of
    uncertainty than the entropy, which it never exceeds."""
    return -output.log_prob.max(axis=-1) >= threshold

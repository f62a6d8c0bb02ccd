"""Value-filtered decoding: tokens whose value is below a threshold are not drawn.

Source: arXiv 2605.14746
Equation: pi ∝ b on {z: V(sz) >= c}; the best token where there is none
When: a bound on how often a good response is cut, Pr(some V <= c given good) <= c/V(x), matters more than the mean
Cost: base and value, one pass each
"""

import jax.numpy as jnp

from jaxalign import critics, evaluation, policies


def keep(threshold, value, log_prob, index):
    """0 for tokens that are kept: those of value >= c, or else the best ones that the base may draw."""
    value = jnp.where(log_prob > -1e19, value, -jnp.inf)
    least = jnp.minimum(value.max(axis=1, keepdims=True), threshold)
    return jnp.where(value >= least, 0, -1e20)


def method(base, value):
    return policies.tilt(base, critics.map_scores(value, keep))


def build(given):
    value, v = given.model("value")
    params = policies.TiltParams(given.params, critics.MapScoresParams(v, given.strength), 1.0)
    return evaluation.sampled(given, method(given.policy, critics.value(value)), params)

"""Proxy-tuning, EFT and DExperts: the base moves by what tuning changed in a small model.

Source: arXiv 2401.08565, 2310.12962, 2105.03023
Equation: log pi = log softmax(log b + a (log E - log A)) at every state
When: a small model was tuned (the expert E) and is there untuned too (A); the base is too large to tune
Cost: base, E and A, one pass each
"""

import jax.numpy as jnp

from jaxalign import critics, evaluation, policies


def method(base, expert, amateur):
    return policies.tilt(base, critics.weighted_sum([critics.from_policy(expert), critics.from_policy(amateur)]))


def build(given):
    (expert, e), (amateur, a) = given.model("expert"), given.model("amateur")
    policy = method(given.policy, policies.language_model(expert), policies.language_model(amateur))
    weights = jnp.array([given.strength, -given.strength])
    params = policies.TiltParams(given.params, critics.WeightedSumParams([e, a], weights), 1.0)
    return evaluation.sampled(given, policy, params)

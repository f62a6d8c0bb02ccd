"""Contrastive decoding: what the expert says and an amateur does not, among plausible tokens.

Source: arXiv 2210.15097, 2309.09117
Equation: log pi = log softmax(log E - k log A) on {z: E(z) >= a max E}
When: open-ended text and reasoning without any reward; the amateur is a small model of the family
Cost: expert and amateur, one pass each
"""

import jax.numpy as jnp

from jaxalign import critics, evaluation, policies


def method(expert, amateur):
    return policies.tilt(policies.min_p(expert), critics.weighted_sum([critics.from_policy(amateur)]))


def build(given):
    amateur, a = given.model("amateur")
    critic = critics.WeightedSumParams([a], jnp.array([-given.strength]))
    params = policies.TiltParams(policies.MinPParams(given.params, 0.1), critic, 1.0)
    return evaluation.sampled(given, method(given.policy, policies.language_model(amateur)), params)

"""GenARM with several objectives: one autoregressive reward for each, weighed at decoding.

Source: arXiv 2410.08193
Equation: log pi = log softmax(log b + sum_i w_i log pi_i) at every state
When: several trained autoregressive rewards; the weights may differ per prompt
Cost: base and m rewards, one pass each
"""

import jax.numpy as jnp

from jaxalign import critics, evaluation, policies


def method(base, arms):
    return policies.tilt(base, critics.weighted_sum([critics.from_policy(arm) for arm in arms]))


def build(given):
    (one, p), (two, q) = given.model("one"), given.model("two")
    policy = method(given.policy, [policies.language_model(one), policies.language_model(two)])
    critic = critics.WeightedSumParams([p, q], jnp.array([given.strength, 1 - given.strength]))
    return evaluation.sampled(given, policy, policies.TiltParams(given.params, critic, 1.0))

"""MOD: models that were aligned with different objectives, weighed at decoding.

Source: arXiv 2406.18853
Equation: log pi = log softmax(sum_i w_i log pi_i) at every state
When: one aligned model for each objective, of one base; the weights differ by user
Cost: each model, one pass
"""

import jax.numpy as jnp

from jaxalign import evaluation, policies


def method(aligned):
    return policies.product(aligned)


def build(given):
    (one, p), (two, q) = given.model("one"), given.model("two")
    weights = jnp.array([given.strength, 1 - given.strength])
    policy = method([policies.language_model(one), policies.language_model(two)])
    both = policies.with_reference(policy, given.policy)
    params = {"policy": policies.PoliciesParams([p, q], weights), "reference": given.params}
    return evaluation.sampled(given, both, params)

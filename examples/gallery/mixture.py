"""Mixture: as if one of several models, drawn by its weight, had written the whole response.

Source: Bayesian mixture of sequence models
Equation: pi(y) = sum_i w_i pi_i(y)
When: models of which each is right for some prompts; never less than log w_i worse than the best
Cost: each model, one pass
"""

import jax.numpy as jnp

from jaxalign import evaluation, policies


def method(each):
    return policies.mix(each, reference=0)


def build(given):
    other, o = given.model("other")
    params = policies.PoliciesParams([given.params, o], jnp.array([1 - given.strength, given.strength]))
    return evaluation.sampled(given, method([given.policy, policies.language_model(other)]), params)

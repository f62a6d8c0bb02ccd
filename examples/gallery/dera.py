"""DeRa: the strength of an alignment chosen at decoding, between the reference and the aligned model.

Source: arXiv 2402.02992
Equation: log pi = log softmax((1 - l) log ref + l log aligned) at every state
When: the KL weight of an aligned model should rise (l < 1) or fall (l > 1); exact for one token, near for more
Cost: base and aligned model, one pass each
"""

import jax.numpy as jnp

from jaxalign import evaluation, policies


def method(reference, aligned):
    return policies.product([reference, aligned])


def build(given):
    aligned, a = given.model("aligned")
    weights = jnp.array([1 - given.strength, given.strength])
    params = policies.PoliciesParams([given.params, a], weights)
    return evaluation.sampled(given, method(given.policy, policies.language_model(aligned)), params)

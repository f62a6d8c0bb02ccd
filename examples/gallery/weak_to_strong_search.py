"""Weak-to-strong search: blocks of the base, chosen by what tuning changed in small models.

Source: arXiv 2405.19262
Equation: keep the block of highest log E(y) - log A(y) among N draws of M tokens
When: as proxy_tuning, where the draws should stay the base's own and only be chosen
Cost: N draws of the base, E and A
"""

import jax.numpy as jnp

from jaxalign import critics, decoding, policies


def method(base, expert, amateur, params, rng, prompts, **limits):
    ratio = critics.weighted_sum([critics.from_policy(expert), critics.from_policy(amateur)])
    return decoding.blockwise(base, ratio, params, rng, prompts, **limits)


def build(given):
    (expert, e), (amateur, a) = given.model("expert"), given.model("amateur")
    parts = given.policy, policies.language_model(expert), policies.language_model(amateur)
    params = {"policy": given.params, "critic": critics.WeightedSumParams([e, a], jnp.array([1.0, -1.0]))}
    size = {"num_samples": int(given.strength), "block_size": 4, **given.limits}
    return lambda rng, prompts: method(*parts, params, rng, prompts, **size)

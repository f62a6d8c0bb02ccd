"""Inference-time pessimism: one of n responses, weighed by how far its reward is above a level.

Source: arXiv 2503.21878 (its choice among n draws; its rejection step is left out)
Equation: P(i) ∝ max(0, r_i - l), l with mean_i max(0, (r_i - l)/beta) = 1
When: best-of-n that should not degrade as n grows: the chi-squared divergence to the base is bounded
Cost: n responses and n rewards
"""

import jax
import jax.numpy as jnp

from jaxalign import decoding


def weights(reward, beta):
    """max(0, (r - l)/beta) [B,n], whose mean is 1: l is that of the k largest rewards for the right k."""
    ordered = -jnp.sort(-reward, axis=1)
    n, count = reward.shape[1], jnp.arange(1, reward.shape[1] + 1)
    levels = (jnp.cumsum(ordered, axis=1) - beta * n) / count
    level = jnp.max(levels, axis=1, keepdims=True)
    return jnp.maximum(0, reward - level) / beta


def method(base, reward, beta, params, rng, prompts, **limits):
    found = decoding.best_of_n(base, reward, params, rng, prompts, **limits)
    weight = weights(found.info.reward, beta)
    pick = jax.random.categorical(jax.random.fold_in(rng, 1), jnp.log(weight))
    rows = jnp.arange(len(pick))
    kept = jax.tree.map(lambda x: x[rows, pick], found.info.samples)
    return found._replace(completions=kept)


def build(given):
    params, n = {"policy": given.params, "reward": given.reward_params}, int(given.strength)
    return lambda rng, prompts: method(
        given.policy, given.reward, 1.0, params, rng, prompts, num_samples=n, **given.limits
    )

"""Speculative rejection: best-of-n that stops drawing what looks bad half-way.

Source: arXiv 2410.20290
Equation: after t_j tokens the keep_j best partial texts by r go on; the best whole one is kept
When: a reward that reads partial texts well, and a large n whose cost should be that of a small one
Cost: n responses to t_1, keep_j from t_j on; one more reward of each at t_j
"""

from jaxalign import decoding


def method(base, reward, params, rng, prompts, n, drop, **limits):
    return decoding.best_of_n(base, reward, params, rng, prompts, num_samples=n, drop=drop, **limits)


def build(given):
    params, n = {"policy": given.params, "reward": given.reward_params}, int(given.strength)
    half = max(given.limits["max_new_tokens"] // 4, 1)
    drop = ((half, n // 2),) if n > 1 and half < given.limits["max_new_tokens"] else ()
    return lambda rng, prompts: method(given.policy, given.reward, params, rng, prompts, n, drop, **given.limits)

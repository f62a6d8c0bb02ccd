"""Soft best-of-n: one of n responses drawn by exp(r/beta) in place of the best.

Source: arXiv 2506.19248
Equation: P(i) ∝ exp(r(y_i)/beta) among n draws of b
When: best-of-n whose over-optimisation should be limited by beta; tends to b exp(r/beta) as n grows
Cost: n responses and n rewards
"""

from jaxalign import decoding


def method(base, reward, params, rng, prompts, n, **limits):
    return decoding.smc(base, reward, params, rng, prompts, num_particles=n, when=decoding.resampling.never, **limits)


def build(given):
    params = {"policy": given.params, "reward": given.reward_params, "beta": 1.0}
    n = int(given.strength)
    return lambda rng, prompts: method(given.policy, given.reward, params, rng, prompts, n, **given.limits)

"""Particle filter and twisted SMC: weighted responses of the optimum, proposed by a critic's tilt.

Source: arXiv 2502.01618, 2404.17546
Equation: pi(y) ∝ b(y) exp(r(y)/beta); E[exp(log_z)] = Z for any critic
When: a value that is not exact: the weights repair what it gets wrong
Cost: n particles of base and critic, n rewards
"""

from jaxalign import critics, decoding, policies


def method(base, critic, reward, params, rng, prompts, n, **limits):
    return decoding.smc(policies.tilt(base, critic), reward, params, rng, prompts, num_particles=n, **limits)


def build(given):
    value, v = given.model("value")
    tilt = policies.TiltParams(given.params, v, given.strength)
    params = {"policy": tilt, "reward": given.reward_params, "beta": given.strength}
    parts = given.policy, critics.value(value), given.reward
    return lambda rng, prompts: method(*parts, params, rng, prompts, 16, **given.limits)

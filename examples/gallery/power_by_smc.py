"""Power sampling by particles: responses of probability b(y)^a, proposed at temperature 1/a.

Source: arXiv 2510.14901 (target)
Equation: pi(y) ∝ b(y)^a; weights over the tempered proposal; E[exp(log_z)] = sum_y b(y)^a
When: as power_by_quest, in one pass of many particles; temperature 1/a alone is another law
Cost: n particles
"""

from jaxalign import decoding, policies, rewards


def method(base, params, rng, prompts, n, **limits):
    tempered, reward = policies.temperature(base), rewards.from_policy(base)
    return decoding.smc(tempered, reward, params, rng, prompts, num_particles=n, **limits)


def build(given):
    tempered = policies.TemperatureParams(given.params, 1 / given.strength)
    params = {"policy": tempered, "reward": given.params, "beta": 1 / (given.strength - 1)}
    return lambda rng, prompts: method(given.policy, params, rng, prompts, 16, **given.limits)

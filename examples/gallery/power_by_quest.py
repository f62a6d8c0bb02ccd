"""Power sampling by a Markov chain: responses of probability b(y)^a.

Source: arXiv 2510.14901
Equation: pi(y) ∝ b(y)^a = b(y) exp((a - 1) log b(y))
When: a base model that knows more than its draws show; no reward is needed
Cost: 32 moves of a response each; the likelihood of each response
"""

from jaxalign import decoding, rewards


def method(base, params, rng, prompts, num_steps, **limits):
    reward = rewards.from_policy(base)
    return decoding.quest(base, reward, params, rng, prompts, num_steps=num_steps, **limits)


def build(given):
    params = {"policy": given.params, "reward": given.params, "beta": 1 / (given.strength - 1)}
    return lambda rng, prompts: method(given.policy, params, rng, prompts, 32, **given.limits)

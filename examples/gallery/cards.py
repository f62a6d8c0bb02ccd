"""CARDS: segments that end where the base is unsure, each drawn until its reward passes.

Source: arXiv 2406.16306
Equation: accept a segment with probability min(1, exp((r - r*)/beta))
When: a reward that reads partial texts well, and fewer reward calls than per-token methods
Cost: the draws and rewards of the segments that were tried
"""

from jaxalign import decoding


def method(base, reward, params, rng, prompts, **limits):
    return decoding.cards(base, reward, params, rng, prompts, **limits)


def build(given):
    thresholds = {"entropy_threshold": 2.0, "reward_threshold": given.strength, "beta": 1.0}
    params = {"policy": given.params, "reward": given.reward_params, **thresholds}
    return lambda rng, prompts: method(given.policy, given.reward, params, rng, prompts, **given.limits)

"""Diverse verifier tree search: several beam searches side by side, of whose ends the reward keeps the best.

Source: arXiv 2408.03314 (beam search in groups, named DVTS by huggingface/search-and-learn)
Equation: the best by r of G independent searches with one beam each: best-of-G of blockwise decoding
When: as beam_search, where its beams become copies of one text
Cost: G·N blocks of base and value at each step, and G rewards
"""

from jaxalign import critics, decoding


def method(base, critic, reward, params, rng, prompts, groups, **limits):
    return decoding.beam(base, critic, params, rng, prompts, width=1, groups=groups, reward=reward, **limits)


def build(given):
    value, v = given.model("value")
    params = {"policy": given.params, "critic": v, "reward": given.reward_params}
    parts, size = (given.policy, critics.value(value), given.reward), {"num_samples": 4, "block_size": 4}
    groups = int(given.strength)
    return lambda rng, prompts: method(*parts, params, rng, prompts, groups, **size, **given.limits)

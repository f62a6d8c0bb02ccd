"""Beam search with a critic: of W texts continued N times each, the W of highest value go on.

Source: arXiv 2408.03314
Equation: keep the W best by V of W·N blocks, block after block; W = 1 is blockwise decoding
When: a value (a process reward) that is right about partial texts, and more search than blockwise's one text
Cost: W·N blocks of base and value at each step
"""

from jaxalign import critics, decoding


def method(base, critic, params, rng, prompts, **limits):
    return decoding.beam(base, critic, params, rng, prompts, **limits)


def build(given):
    value, v = given.model("value")
    params, size = {"policy": given.params, "critic": v}, {"num_samples": 4, "block_size": 4, **given.limits}
    critic, width = critics.value(value), int(given.strength)
    return lambda rng, prompts: method(given.policy, critic, params, rng, prompts, width=width, **size)

"""Min-p: tokens at least a times as probable as the most probable one.

Source: arXiv 2407.01082
Equation: pi ∝ b on {z: b(z) >= a max b}
When: draws at a high temperature that should stay plausible
Cost: base, one pass
"""

from jaxalign import evaluation, policies


def method(base):
    return policies.min_p(base)


def build(given):
    params = policies.MinPParams(given.params, given.strength)
    return evaluation.sampled(given, method(given.policy), params)

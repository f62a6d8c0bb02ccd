"""Locally typical sampling: tokens whose surprisal is near the entropy.

Source: arXiv 2202.00666
Equation: pi ∝ b on the shortest list by |-log b - H| of mass >= tau
When: text that is neither dull nor erratic, without a reward
Cost: base, one pass and a sort
"""

from jaxalign import evaluation, policies


def method(base):
    return policies.typical(base)


def build(given):
    params = policies.TypicalParams(given.params, given.strength)
    return evaluation.sampled(given, method(given.policy), params)

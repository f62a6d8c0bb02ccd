"""Inference-time pessimism by tokens: the law of bounded chi-squared divergence, read from a head of laws.

Source: arXiv 2503.21878
Equation: pi(y) = b(y) max(0, (r(y) - l)/beta), l with E_b[max(0, (r - l)/beta)] = 1
When: as inference_time_pessimism, without n draws of each prompt; one head serves every beta
Cost: base and a head of laws, one pass each
"""

from jaxalign import critics, evaluation, policies


def method(base, lm):
    return policies.tilt(base, critics.distribution(lm, critics.reads.chi_squared()))


def build(given):
    lm, head = given.model("laws")
    critic = critics.DistributionParams(head, {"beta": given.strength})
    return evaluation.sampled(given, method(given.policy, lm), policies.TiltParams(given.params, critic, 1.0))

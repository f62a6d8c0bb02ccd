"""SRS-CD: a value of texts whose reward exceeds the threshold of the prompt, read from a head of laws.

Source: arXiv 2602.02572
Equation: pi(y) ∝ b(y) exp(bound 1[r(y) > m]/beta), m the optimal threshold of the prompt's law
When: as srs_args, where the reward reads whole texts alone; no training for another bound or beta
Cost: base and a head of laws, one pass each
"""

from jaxalign import critics, evaluation, policies


def method(base, lm):
    return policies.tilt(base, critics.distribution(lm, critics.reads.follower(solve=True)))


def build(given):
    lm, head = given.model("laws")
    critic = critics.DistributionParams(head, {"bound": given.strength, "beta": 1.0})
    return evaluation.sampled(given, method(given.policy, lm), policies.TiltParams(given.params, critic, 1.0))

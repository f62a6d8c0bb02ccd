"""InfAlign's tilt by tokens: the reward's place among those of the prompt, read from a head of laws.

Source: arXiv 2412.19792
Equation: pi(y) ∝ b(y) exp(phi(C(x,y))/beta), phi = (e^5C - 1)/(e^5 - 1), C the place of r(x,y) in its law under b
When: as infalign_tilt, without base responses of the prompt; phi is any transform of places
Cost: base and a head of laws, one pass each
"""

from jaxalign import critics, evaluation, infalign, policies


def method(base, lm, transform):
    return policies.tilt(base, critics.distribution(lm, critics.reads.calibrated(transform)))


def build(given):
    lm, head = given.model("laws")
    critic = critics.DistributionParams(head, {"beta": given.strength})
    policy = method(given.policy, lm, infalign.exponential(5.0))
    return evaluation.sampled(given, policy, policies.TiltParams(given.params, critic, 1.0))

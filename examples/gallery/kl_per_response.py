"""KL-budgeted responses: the optimum at the beta of each prompt that spends a given KL.

Source: gibbs.match_kl on the prompt's law of rewards
Equation: pi(y) ∝ b(y) exp(r(y)/beta_x), beta_x with KL(pi || b) = the budget at every prompt
When: one budget for prompts of unlike rewards; kl_budget bounds each token, this one the response
Cost: base and a head of laws, one pass each
"""

from jaxalign import critics, evaluation, policies


def method(base, lm):
    return policies.tilt(base, critics.distribution(lm, critics.reads.kl()))


def build(given):
    lm, head = given.model("laws")
    critic = critics.DistributionParams(head, {"nats": given.strength})
    return evaluation.sampled(given, method(given.policy, lm), policies.TiltParams(given.params, critic, 1.0))

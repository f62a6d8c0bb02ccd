"""SRS-ARGS: the reward of partial texts, shaped by a threshold that each step finds over its candidates.

Source: arXiv 2602.02572
Equation: q = bound 1[r(sz) > m(s)], m the threshold of the candidates' optimum
When: ARGS whose reward is over-optimised; the follower gains where the true utility is above the threshold
Cost: base, and k candidates of the reward per token
"""

from jaxalign import critics, evaluation, policies


def method(base, scores, beta, top_k):
    return policies.tilt(base, critics.shaped_over_candidates(scores, beta=beta), top_k=top_k)


def build(given):
    lm, r = given.model("reward")
    policy = method(given.policy, critics.args(lm), given.strength, 8)
    critic = critics.ShapedParams(r, given.strength)
    return evaluation.sampled(given, policy, policies.TiltParams(given.params, critic, given.strength))

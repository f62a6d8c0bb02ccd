"""Look-ahead: candidates are scored by the mean reward of what the base writes next.

Source: arXiv 2405.20495 (with an aligned baseline: Transfer Q*)
Equation: q(s,z) = E[r] after l tokens of b from sz; for l >= T the value V_ref
When: a reward of whole texts and no trained value; few candidates
Cost: k candidates, each with a roll-out of l tokens and a reward
"""

from jaxalign import critics, evaluation, policies


def method(base, reward, n, lookahead, top_k=None):
    ahead = critics.transfer_q(base, reward, num_samples=n, lookahead=lookahead)
    return policies.tilt(base, ahead, top_k=top_k)


def build(given):
    critic = critics.TransferQParams(baseline=given.params, reward=given.reward_params)
    policy = method(given.policy, given.reward, 2, 4, top_k=4)
    return evaluation.sampled(given, policy, policies.TiltParams(given.params, critic, given.strength))

"""RMOD: the tilt by the least favourable weights of several values, found anew at each token.

Source: arXiv 2503.08796
Equation: max_pi min_w (sum_g w_g E[V_g])/beta - KL
When: several objectives without weights, none of which should be given up
Cost: base and m values, one pass each; a small convex problem per token
"""

from jaxalign import critics, evaluation, policies, pools


def method(base, values):
    return policies.tilt(base, critics.pool(values, pools.worst_case()))


def build(given):
    (one, p), (two, q) = given.model("value_one"), given.model("value_two")
    policy = method(given.policy, (critics.value(one), critics.value(two)))
    critic = critics.PoolParams([p, q], {"beta": given.strength})
    return evaluation.sampled(given, policy, policies.TiltParams(given.params, critic, given.strength))

"""Best-of-n by the lower bound of an ensemble: mean less k standard deviations of reward models.

Source: arXiv 2310.02743 (which takes the variance)
Equation: the best of n draws by mean_i r_i - k std_i r_i
When: several reward models of one task; best-of-n of one of them over-optimises
Cost: n responses, m rewards of each
"""

from jaxalign import decoding, pools, rewards


def method(base, each, k, params, rng, prompts, **limits):
    return decoding.best_of_n(base, rewards.pool(each, pools.lower_bound(k)), params, rng, prompts, **limits)


def build(given):
    (one, p), (two, q) = given.model("reward_one"), given.model("reward_two")
    each, n = (rewards.from_model(one), rewards.from_model(two)), int(given.strength)
    params = {"policy": given.params, "reward": rewards.PoolParams([p, q])}
    return lambda rng, prompts: method(given.policy, each, 1.0, params, rng, prompts, num_samples=n, **given.limits)

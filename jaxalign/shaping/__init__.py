"""Stackelberg reward shaping (arXiv 2602.02572): the reward provider leads, the KL-regularised model follows.

Against any reward r in [0, B] the follower answers with pi ∝ base·exp(r/beta). The leader pays the reward whose answer
has the highest true utility u: B above a threshold that equals the utility delivered, 0 below. `threshold` solves and
uses that, `leader` climbs the same objective by gradient where no closed form exists, `baselines` holds what else is
done to rewards, `network` a shaping function that is learned. `surrogates` has scalars whose gradient is the leader's
through a follower that is sampled, `response` the gradient through one that is trained.

Arguments are in the order (log_base, reward); every other array is keyword-only, since a swap of two arrays of one
shape would go unnoticed.
"""

from jaxalign.shaping.baselines import (
    cap,
    log_sigmoid,
    mean_sigmoid,
    meanstd,
    minmax,
    preference_as_reward,
    raw,
    stackelberg,
)
from jaxalign.shaping.leader import (
    Leader,
    Objective,
    effective_samples,
    excess_kl,
    leader_utility,
    score_function,
    solve_leader,
)
from jaxalign.shaping.network import MonotoneShaping, statistics
from jaxalign.shaping.response import (
    BilevelObjective,
    BilevelParams,
    Implicit,
    best_response,
    implicit,
    nudged,
    unrolled,
)
from jaxalign.shaping.surrogates import (
    WeightedEstimate,
    all_tokens,
    best_of_score,
    best_of_utility,
    covariance,
    smc,
    soft_pick,
    togo,
)
from jaxalign.shaping.threshold import (
    accept_log_prob,
    exceedance_log_weight,
    exceedance_soft_value,
    expectile_loss,
    kl_bound,
    mixture,
    optimal_threshold,
    soft_threshold_reward,
    threshold_reward,
)

__all__ = [
    "BilevelObjective",
    "BilevelParams",
    "Implicit",
    "Leader",
    "MonotoneShaping",
    "Objective",
    "WeightedEstimate",
    "accept_log_prob",
    "all_tokens",
    "best_of_score",
    "best_of_utility",
    "best_response",
    "cap",
    "covariance",
    "effective_samples",
    "exceedance_log_weight",
    "exceedance_soft_value",
    "excess_kl",
    "expectile_loss",
    "implicit",
    "kl_bound",
    "leader_utility",
    "log_sigmoid",
    "mean_sigmoid",
    "meanstd",
    "minmax",
    "mixture",
    "nudged",
    "optimal_threshold",
    "preference_as_reward",
    "raw",
    "score_function",
    "smc",
    "soft_pick",
    "soft_threshold_reward",
    "solve_leader",
    "stackelberg",
    "statistics",
    "threshold_reward",
    "togo",
    "unrolled",
]

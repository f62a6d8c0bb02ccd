"""Stackelberg reward shaping (arXiv 2602.02572): the reward provider leads, the KL-regularised model follows.

Against any reward r in [0, B] the follower answers with pi ∝ base·exp(r/beta). The leader pays the reward whose answer
has the highest true utility u: B above a threshold that equals the utility delivered, 0 below. `threshold` solves and
uses that, `leader` climbs the same objective by gradient where no closed form exists, `baselines` holds what else is
done to rewards, `network` a shaping function that is learned. `surrogates` and `picks` have scalars whose gradient is
the leader's through a follower that is sampled, `response` the gradient through one that is trained. `constraints` and
`groups` solve for what the leader pays when beta is unknown, KL is limited, or groups of users differ.

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
from jaxalign.shaping.constraints import BudgetReward, budget_reward, robust_threshold
from jaxalign.shaping.groups import WorstGroup, worst_group
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
from jaxalign.shaping.picks import best_of_score, best_of_utility, soft_pick
from jaxalign.shaping.response import (
    BilevelObjective,
    BilevelParams,
    Implicit,
    best_response,
    implicit,
    unrolled,
)
from jaxalign.shaping.surrogates import (
    WeightedEstimate,
    all_tokens,
    covariance,
    nudged,
    smc,
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
    "BudgetReward",
    "Implicit",
    "Leader",
    "MonotoneShaping",
    "Objective",
    "WeightedEstimate",
    "WorstGroup",
    "accept_log_prob",
    "all_tokens",
    "best_of_score",
    "best_of_utility",
    "best_response",
    "budget_reward",
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
    "robust_threshold",
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
    "worst_group",
]

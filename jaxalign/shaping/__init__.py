"""Stackelberg reward shaping (arXiv 2602.02572): the reward provider leads, the KL-regularised model follows.

Against any reward r in [0, B] the follower answers with pi ∝ base·exp(r/beta). The leader pays the reward whose answer
has the highest true utility u: B above a threshold that equals the utility delivered, 0 below. `threshold` solves and
uses that, `leader` climbs the same objective by gradient where no closed form exists, `baselines` holds what else is
done to rewards, `network` a shaping function that is learned.

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
    "Leader",
    "MonotoneShaping",
    "Objective",
    "accept_log_prob",
    "cap",
    "effective_samples",
    "exceedance_log_weight",
    "exceedance_soft_value",
    "excess_kl",
    "expectile_loss",
    "kl_bound",
    "leader_utility",
    "log_sigmoid",
    "mean_sigmoid",
    "meanstd",
    "minmax",
    "mixture",
    "optimal_threshold",
    "preference_as_reward",
    "raw",
    "score_function",
    "soft_threshold_reward",
    "solve_leader",
    "stackelberg",
    "statistics",
    "threshold_reward",
]

"""Training objectives, each a function on arrays that returns one number: the mean over the rows of the batch.

The prediction comes first; targets, masks and references are keyword-only, since a swap of two arrays of one shape
would go unnoticed. Pairs keep the field's order, chosen before rejected.

Nothing needs [B,L,V] at once: log-probabilities of the tokens come in, or (for the Bellman target) one chunk of
positions. Arrays whose shapes differ are AssertionErrors. Masks are double-where: an entry that is masked out may hold
NaN and leaves value and gradient finite.
"""

from jaxalign.losses._distribution import distribution, grid_error, two_hot
from jaxalign.losses._policy_gradient import clipped_ratios, clipped_value, kl_penalty, policy_gradient
from jaxalign.losses._preferences import (
    autoregressive_reward,
    bradley_terry,
    dpo,
    ipo,
    language_model,
    log_ratio_difference,
)
from jaxalign.losses._regression import HIGHEST_RATIO, LOWEST_TARGET, RegressionLimits, regress, regression_limits
from jaxalign.losses._values import (
    cd_q,
    clipped_share,
    exceedance,
    expected_next,
    fudge,
    last_and_pairs,
    soft_value,
    td,
)

__all__ = [
    "HIGHEST_RATIO",
    "LOWEST_TARGET",
    "RegressionLimits",
    "autoregressive_reward",
    "bradley_terry",
    "cd_q",
    "clipped_ratios",
    "clipped_share",
    "clipped_value",
    "distribution",
    "dpo",
    "exceedance",
    "expected_next",
    "fudge",
    "grid_error",
    "ipo",
    "kl_penalty",
    "language_model",
    "last_and_pairs",
    "log_ratio_difference",
    "policy_gradient",
    "regress",
    "regression_limits",
    "soft_value",
    "td",
    "two_hot",
]

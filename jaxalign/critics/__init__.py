"""Critics: which Q tilts the base. Each builder takes a model (or critics) and gives a Critic.

A critic's `score` may be asked for K candidates or (None) for the whole vocabulary; its proposal holds what `advance`
needs to move to the chosen one without another pass over the prefix.

Builders are cached by value, as those of `jaxalign.policies`. Params of a builder that combines critics are its
NamedTuple, as WeightedSumParams(critics, weights), or a dict of the same names.
"""

from jaxalign._arrays import look_up
from jaxalign.critics import reads
from jaxalign.critics._args import args
from jaxalign.critics._combinators import MapScoresParams, ScoreMap, WeightedSumParams, map_scores, weighted_sum
from jaxalign.critics._controlled_decoding import QHead, hidden_value, value
from jaxalign.critics._distribution import DistributionParams, distribution, laws
from jaxalign.critics._from_apply import TextScores, from_apply, from_equinox, from_nnx, from_torch
from jaxalign.critics._from_policy import from_policy
from jaxalign.critics._genarm import genarm
from jaxalign.critics._kinds import increment_of, level_of
from jaxalign.critics._pool import PoolParams, pool
from jaxalign.critics._stackelberg import ShapedParams, follower, shaped_over_candidates
from jaxalign.critics._transfer_q import TransferQParams, effective_rollouts, transfer_q

__all__ = [
    "DistributionParams",
    "MapScoresParams",
    "PoolParams",
    "QHead",
    "ScoreMap",
    "ShapedParams",
    "TextScores",
    "TransferQParams",
    "WeightedSumParams",
    "args",
    "distribution",
    "effective_rollouts",
    "follower",
    "from_apply",
    "from_equinox",
    "from_nnx",
    "from_policy",
    "from_torch",
    "genarm",
    "hidden_value",
    "increment_of",
    "laws",
    "level_of",
    "look_up",
    "map_scores",
    "pool",
    "reads",
    "shaped_over_candidates",
    "transfer_q",
    "value",
    "weighted_sum",
]

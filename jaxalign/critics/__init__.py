"""Critics: which Q tilts the base. Each function takes a model (or critics) and gives a Critic.

A critic's `score` may be asked for K candidates or (None) for the whole vocabulary; its proposal holds what `advance`
needs to move to the chosen one without another pass over the prefix.
"""

from jaxalign.critics._combinators import map_scores, shaped_over_candidates, weighted_sum
from jaxalign.critics._models import args, follower, genarm, hidden_value, value
from jaxalign.critics._transfer_q import effective_rollouts, transfer_q

__all__ = [
    "args",
    "effective_rollouts",
    "follower",
    "genarm",
    "hidden_value",
    "map_scores",
    "shaped_over_candidates",
    "transfer_q",
    "value",
    "weighted_sum",
]

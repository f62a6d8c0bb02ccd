"""Critics: which Q tilts the base. Each function takes a model (or critics) and gives a Critic.

A critic's `score` may be asked for K candidates or (None) for the whole vocabulary; its proposal holds what `advance`
needs to move to the chosen one without another pass over the prefix.
"""

from jaxalign.critics.combinators import map_scores, shaped_over_candidates, weighted_sum
from jaxalign.critics.models import args, autoregressive, follower, hidden_value, value
from jaxalign.critics.transfer import effective_rollouts, transfer_q

__all__ = [
    "args",
    "autoregressive",
    "effective_rollouts",
    "follower",
    "hidden_value",
    "map_scores",
    "shaped_over_candidates",
    "transfer_q",
    "value",
    "weighted_sum",
]

"""Rewards of whole responses: (params, tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> reward [N].

Each combinator takes Rewards and gives a Reward, which keeps a prefix (`PrefixReward`) where all its parts do. All come
out in at least float32.
"""

from jaxalign.rewards.combinators import calibrated, combine, map_reward, shaped, weighted_sum
from jaxalign.rewards.models import CheckedGain, embedding_gain, from_model, log_likelihood
from jaxalign.rewards.programs import from_numpy, from_text, is_program, parse, program

__all__ = [
    "CheckedGain",
    "calibrated",
    "combine",
    "embedding_gain",
    "from_model",
    "from_numpy",
    "from_text",
    "is_program",
    "log_likelihood",
    "map_reward",
    "parse",
    "program",
    "shaped",
    "weighted_sum",
]

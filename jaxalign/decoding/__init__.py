"""Decoders: from a Policy to responses."""

from jaxalign.decoding._best_of_n import best_of_n, join
from jaxalign.decoding._blockwise import blockwise
from jaxalign.decoding._cards import Cards, cards
from jaxalign.decoding._ggro import Nudged, ggro
from jaxalign.decoding._quest import Chain, quest
from jaxalign.decoding._rejection import Rejection, first_above, rejection
from jaxalign.decoding._sampling import log_prob, sample
from jaxalign.decoding._smc import Particles, smc

__all__ = [
    "Cards",
    "Chain",
    "Nudged",
    "Particles",
    "Rejection",
    "best_of_n",
    "blockwise",
    "cards",
    "first_above",
    "ggro",
    "join",
    "log_prob",
    "quest",
    "rejection",
    "sample",
    "smc",
]

"""Decoders: from a Policy to responses."""

from jaxalign.decoding.blockwise import blockwise
from jaxalign.decoding.cards import Cards, cards
from jaxalign.decoding.nudging import Nudged, nudge
from jaxalign.decoding.quest import Chain, quest
from jaxalign.decoding.rejection import Rejection, first_above, rejection
from jaxalign.decoding.sampling import log_prob, sample
from jaxalign.decoding.selection import best_of_n, join
from jaxalign.decoding.smc import Particles, smc

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
    "join",
    "log_prob",
    "nudge",
    "quest",
    "rejection",
    "sample",
    "smc",
]

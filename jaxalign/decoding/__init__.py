"""Decoders: from a Policy to responses."""

from jaxalign.decoding.nudging import Nudged, nudge
from jaxalign.decoding.rejection import Rejection, rejection
from jaxalign.decoding.sampling import log_prob, sample
from jaxalign.decoding.selection import best_of_n, join

__all__ = ["Nudged", "Rejection", "best_of_n", "join", "log_prob", "nudge", "rejection", "sample"]

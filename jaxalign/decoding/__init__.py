"""Decoders: from a Policy to responses."""

from jaxalign.decoding.blockwise import blockwise
from jaxalign.decoding.rejection import Rejection, rejection
from jaxalign.decoding.sampling import log_prob, sample
from jaxalign.decoding.selection import best_of_n, join

__all__ = ["Rejection", "best_of_n", "blockwise", "join", "log_prob", "rejection", "sample"]

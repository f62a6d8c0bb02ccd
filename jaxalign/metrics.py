"""Statistics of decoded responses: means with intervals, diversity, coherence, and the KL of each kind of decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """mean, and the half-width of its 95 % interval (normal approximation; NaN for fewer than two values)."""

    mean: float
    half_width: float


def mean_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of independent values and 1.96 standard errors. ValueError for no values."""
    x = np.asarray(values, np.float64)
    if x.size == 0:
        raise ValueError("values: expected at least one, found none")
    if x.size == 1:
        return Estimate(float(x[0]), math.nan)
    return Estimate(float(x.mean()), float(1.96 * x.std(ddof=1) / math.sqrt(x.size)))


def best_of_n_kl_bound(n: int) -> float:
    """log n − (n−1)/n, in nats: an upper bound of KL(best of n‖base). ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, found {n}")
    return math.log(n) - (n - 1) / n


def blockwise_kl_bound(mask: np.ndarray, block: int, candidates: int) -> np.ndarray:
    """⌈|y|/M⌉·(log K − (K−1)/K) of each response, [...] from its mask [...,T], in nats: the mean over decoded responses
    bounds KL(blockwise best-of-K with blocks of M‖base) (arXiv 2310.17022). ValueError for M or K < 1."""
    if block < 1:
        raise ValueError(f"block: expected at least 1, found {block}")
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, found {candidates}")
    return -(-np.asarray(mask, np.int64).sum(axis=-1) // block) * best_of_n_kl_bound(candidates)


def diversity(tokens: Sequence[object]) -> float:
    """Π_{n=2..4} |unique n-grams| / (|n-grams| + 1): the diversity of ARGS (arXiv 2402.01694, its code), of one
    response as words or token ids.

    The +1 avoids 0/0 and makes W >= 4 distinct tokens come out at exactly (W−3)/W, and one token at 0: the measure
    rewards length.
    """
    out = 1.0
    for n in (2, 3, 4):
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        out *= len(set(grams)) / (len(grams) + 1)
    return out


def coherence(prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Cosine of sentence embeddings [...,D] of prompt and response; 1 for identical ones. Any embedding model."""
    prompt, response = np.asarray(prompt, np.float64), np.asarray(response, np.float64)
    norm = np.linalg.norm(prompt, axis=-1) * np.linalg.norm(response, axis=-1)
    return (prompt * response).sum(axis=-1) / norm

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


def best_of_n_curve(reward: np.ndarray, value: np.ndarray | None = None) -> np.ndarray:
    """[...,N]: entry n−1 estimates E[value of the best of n by reward] without bias, for all n = 1..N at once, from N
    independent samples with reward and value [...,N] (the reward itself when None).

    It is the mean over all subsets of n samples. In the order of rewards sample i is the best of a share
    C(i−1, n−1)/C(N, n) of them; equal rewards share theirs evenly, which is the law of a best-of-n that breaks ties at
    random (`tree.best_of_n_law`). Entry 0 is the mean of the values, entry N−1 the value of the best. ValueError for
    no samples, shapes that differ, or a reward that is NaN.
    """
    r = np.asarray(reward, np.float64)
    v = r if value is None else np.asarray(value, np.float64)
    if r.shape != v.shape or r.ndim == 0 or r.shape[-1] == 0:
        raise ValueError(f"reward, value: expected one shape [...,N], N at least 1, found {r.shape} and {v.shape}")
    if np.isnan(r).any():
        raise ValueError("reward: expected numbers, found NaN")
    count = r.shape[-1]
    order = np.argsort(r, axis=-1, kind="stable")
    r, v = np.take_along_axis(r, order, axis=-1), np.take_along_axis(v, order, axis=-1)
    # The mean value of those of equal reward, in the place of each.
    flat_r, flat_v = r.reshape(-1, count), v.reshape(-1, count)
    starts = np.concatenate([np.ones((len(flat_r), 1), bool), flat_r[:, 1:] != flat_r[:, :-1]], axis=1)
    group = np.cumsum(starts.reshape(-1)) - 1
    shared = (np.bincount(group, flat_v.reshape(-1)) / np.bincount(group))[group].reshape(flat_v.shape)
    rank = np.arange(count)  # i − 1
    weight, out = np.full(count, 1 / count), np.empty_like(flat_v)
    for n in range(1, count + 1):
        # Samples that are the best of no subset count nothing, whatever their value.
        out[:, n - 1] = shared[:, n - 1 :] @ weight[n - 1 :]
        weight = weight * np.maximum(rank - n + 1, 0) / n * (n + 1) / max(count - n, 1)
    return out.reshape(r.shape)


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

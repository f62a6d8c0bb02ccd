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


def blockwise_kl_bound(mask: np.ndarray, *, block_size: int, num_samples: int) -> np.ndarray:
    """⌈|y|/M⌉·(log K − (K−1)/K) of each response, [...] from its mask [...,T], in nats: the mean over decoded responses
    bounds KL(blockwise best-of-K with blocks of M‖base) (arXiv 2310.17022). ValueError for M or K < 1."""
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, found {block_size}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, found {num_samples}")
    result: np.ndarray = -(-np.asarray(mask, np.int64).sum(axis=-1) // block_size) * best_of_n_kl_bound(num_samples)
    return result


def best_of_n_curve(reward: np.ndarray, *, value: np.ndarray | None = None) -> np.ndarray:
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


class SelectionWinRates(NamedTuple):
    """best_of_n, worst_of_n [...,N]: entry n−1 estimates the win rate when n draws a side are reduced to the best (the
    worst) by reward; entry 0 is the plain win rate in both."""

    best_of_n: np.ndarray
    worst_of_n: np.ndarray


def selection_win_rates(reward: np.ndarray, *, base_reward: np.ndarray) -> SelectionWinRates:
    """Win rates of a policy over its base under best-of-n and worst-of-n on both sides, without bias, for all n at once
    from one set of samples a side: reward [...,K] of the policy's, base_reward [...,L] of the base's, n = 1..min(K,L).

    W = Σ_ij v_i·v'_j·(1[y_i > z_j] + ½·1[y_i = z_j]) in ascending order, v_i = C(i−1, n−1)/C(K, n) for the best and
    C(K−i, n−1)/C(K, n) for the worst: the mean over all pairs of subsets. How equal rewards are ordered changes
    nothing. The estimates of different n rest on the same samples. ValueError for no samples, leading axes that differ,
    or NaN.
    """
    y, z = np.sort(np.asarray(reward, np.float64)), np.sort(np.asarray(base_reward, np.float64))
    if y.ndim == 0 or y.shape[:-1] != z.shape[:-1] or 0 in (y.shape[-1], z.shape[-1]):
        raise ValueError(f"reward, base_reward: expected [...,K] and [...,L], found {y.shape} and {z.shape}")
    if np.isnan(y).any() or np.isnan(z).any():
        raise ValueError("reward, base_reward: expected numbers, found NaN")
    won = (y[..., :, None] > z[..., None, :]) + 0.5 * (y[..., :, None] == z[..., None, :])
    left, right = _subset_weights(y.shape[-1]), _subset_weights(z.shape[-1])
    most = min(len(left), len(right))

    def both(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        result: np.ndarray = ((left[:most] @ won) * right[:most]).sum(axis=-1)
        return result

    return SelectionWinRates(both(left, right), both(left[:, ::-1], right[:, ::-1]))


def _subset_weights(count: int) -> np.ndarray:
    """[count,count]: row n−1 holds C(i−1, n−1)/C(count, n), the share of subsets of n whose best is sample i."""
    rank, weight, out = np.arange(count), np.full(count, 1 / count), np.empty((count, count))
    for n in range(1, count + 1):
        out[n - 1] = weight
        weight = weight * np.maximum(rank - n + 1, 0) / n * (n + 1) / max(count - n, 1)
    return out


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
    result: np.ndarray = (prompt * response).sum(axis=-1) / norm
    return result

"""Statistics of decoded responses: means with intervals, diversity, coherence, and the KL of each kind of decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "Estimate",
    "SelectionWinRates",
    "best_of_n_curve",
    "best_of_n_kl_bound",
    "blockwise_kl_bound",
    "coherence",
    "diversity",
    "mean_interval",
    "selection_win_rates",
]


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    """The mean."""
    half_width: float
    """Half the width of its 95 % interval (normal approximation); NaN for fewer than two values."""


def mean_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Gives the mean of independent values and 1.96 standard errors (normal approximation).

    Args:
      values: at least one number; an array is read flat.

    Returns:
      An Estimate; its half-width is NaN for a single value.

    Raises:
      ValueError: no values.
    """
    x = np.asarray(values, np.float64)
    if x.size == 0:
        raise ValueError("values: expected at least one, found none")
    if x.size == 1:
        return Estimate(float(x[0]), math.nan)
    return Estimate(float(x.mean()), float(1.96 * x.std(ddof=1) / math.sqrt(x.size)))


def best_of_n_kl_bound(n: int) -> float:
    """Gives an upper bound of the KL of best-of-n to its base, log n − (n−1)/n.

    Args:
      n: samples >= 1.

    Returns:
      The bound, in nats.

    Raises:
      ValueError: n below 1.

    Source: arXiv 2401.01879.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, found {n}")
    return math.log(n) - (n - 1) / n


def blockwise_kl_bound(mask: np.ndarray, *, block_size: int, num_samples: int) -> np.ndarray:
    """Gives the bound of each response for blockwise best-of-K, ⌈|y|/M⌉·(log K − (K−1)/K).

    Its mean over decoded responses bounds KL(blockwise best-of-K with blocks of M‖base).

    Args:
      mask: [...,T], of decoded responses, EOS included.
      block_size: M >= 1 tokens.
      num_samples: K >= 1 blocks to choose from.

    Returns:
      [...], in nats.

    Raises:
      ValueError: block_size or num_samples below 1.

    Source: arXiv 2310.17022.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, found {block_size}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, found {num_samples}")
    result: np.ndarray = -(-np.asarray(mask, np.int64).sum(axis=-1) // block_size) * best_of_n_kl_bound(num_samples)
    return result


def best_of_n_curve(reward: np.ndarray, *, value: np.ndarray | None = None) -> np.ndarray:
    """Estimates E[value of the best of n by reward] without bias, for all n = 1..N at once.

    It is the mean over all subsets of n samples. In the order of rewards sample i is the best of a share
    C(i−1, n−1)/C(N, n) of them; equal rewards share theirs evenly, which is the law of a best-of-n that breaks ties at
    random (`tree.best_of_n_law`).

    Args:
      reward: [...,N], of N independent samples.
      value: [...,N], what the chosen sample is worth; the reward itself when None.

    Returns:
      [...,N] in units of value: entry n−1 is the estimate for n. Entry 0 is the mean of the values, entry N−1 the value
      of the best.

    Raises:
      ValueError: no samples, shapes that differ, or a reward that is NaN.
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
    weight, out, finite = np.full(count, 1 / count), np.empty_like(flat_v), np.isfinite(shared).all()
    for n in range(1, count + 1):
        # Samples that are the best of no subset, or of a share below every number, count nothing whatever their value.
        best, share = shared[:, n - 1 :], weight[n - 1 :]
        out[:, n - 1] = (best if finite else np.where(share > 0, best, 0)) @ share
        weight = weight * np.maximum(rank - n + 1, 0) / n * (n + 1) / max(count - n, 1)
    return out.reshape(r.shape)


class SelectionWinRates(NamedTuple):
    """Win rates when n draws a side are reduced to one by reward: entry n−1 is for n, entry 0 the plain win rate."""

    best_of_n: np.ndarray
    """[...,N], the best of n draws by reward on both sides."""
    worst_of_n: np.ndarray
    """[...,N], the worst of n draws by reward on both sides."""


def selection_win_rates(reward: np.ndarray, *, base_reward: np.ndarray) -> SelectionWinRates:
    """Estimates the win rates of a policy over its base under best-of-n and worst-of-n on both sides, for all n at
    once.

    W = Σ_ij v_i·v'_j·(1[y_i > z_j] + ½·1[y_i = z_j]) in ascending order, v_i = C(i−1, n−1)/C(K, n) for the best and
    C(K−i, n−1)/C(K, n) for the worst: the mean over all pairs of subsets, without bias. How equal rewards are ordered
    changes nothing. The estimates of different n rest on the same samples.

    Args:
      reward: [...,K], of the policy's samples.
      base_reward: [...,L], of the base's.

    Returns:
      SelectionWinRates for n = 1..min(K,L).

    Raises:
      ValueError: no samples, leading axes that differ, or NaN.
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
    """Gives the diversity of one response, Π_{n=2..4} |unique n-grams| / (|n-grams| + 1).

    The +1 avoids 0/0 and makes W >= 4 distinct tokens come out at exactly (W−3)/W, and one token at 0: the measure
    rewards length.

    Args:
      tokens: words or token ids.

    Returns:
      A number in [0, 1).

    Source: ARGS, arXiv 2402.01694, as its code computes it.
    """
    out = 1.0
    for n in (2, 3, 4):
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        out *= len(set(grams)) / (len(grams) + 1)
    return out


def coherence(prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Gives the cosine of the sentence embeddings of prompt and response, by any embedding model.

    Args:
      prompt: [...,D].
      response: [...,D].

    Returns:
      [...] in [−1, 1]; 1 for embeddings of one direction.
    """
    prompt, response = np.asarray(prompt, np.float64), np.asarray(response, np.float64)
    norm = np.linalg.norm(prompt, axis=-1) * np.linalg.norm(response, axis=-1)
    result: np.ndarray = (prompt * response).sum(axis=-1) / norm
    return result

"""The KL that each decoder gives: its number, its kind and its formula."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxalign.types import KL, Array, Completions


def sum_of_steps(completions: Completions) -> KL:
    """The KL of sampling from a policy: Σ_t of the exact KL of each step's distribution to the base's, whose mean over
    draws is the KL of the whole responses.

    Args:
      completions: as `decoding.sample` gives them, [...,T]; numpy arrays are summed by numpy.

    Returns:
      A KL of [...], in nats.

    Raises:
      ValueError: completions that hold no exact KL, as those of a policy's parallel scoring.
    """
    if completions.kl is None:
        raise ValueError("completions: expected the exact KL of each step, found kl = None")
    return KL(completions.kl.sum(axis=-1), "exact", "sum of exact per-step KL")


def surprisal(completions: Completions) -> KL:
    """Gives the KL of a deterministic decoder: −log pi_ref(y) of its response.

    Args:
      completions: [...,T], as the decoder gives them.

    Returns:
      A KL of [...], in nats, of kind "surprisal".
    """
    return KL(-completions.log_prob_ref.sum(axis=-1), "surprisal", "mean -log pi_ref(y)")


def _reference(tempered: bool) -> Literal["policy", "tempered policy"]:
    return "tempered policy" if tempered else "policy"


def best_of_n_bound(n: int, like: Array, *, tempered: bool) -> KL:
    """log n − (n−1)/n for each entry of like [B]; `metrics.best_of_n_kl_bound`."""
    value = jnp.full(like.shape, selection_bound(n), jnp.promote_types(like.dtype, jnp.float32))
    return KL(value, "bound", "bound log n - (n-1)/n", _reference(tempered))


def blockwise_bound(blocks: Array, n: int, dtype: np.dtype, *, tempered: bool) -> KL:
    """⌈|y|/M⌉·(log K − (K−1)/K) of blocks [B] begun; `metrics.blockwise_kl_bound`."""
    value = (blocks * selection_bound(n)).astype(jnp.promote_types(dtype, jnp.float32))
    return KL(value, "bound", "bound ceil(|y|/M) (log K - (K-1)/K)", _reference(tempered))


def beam_bound(blocks: Array, beams: int, n: int, dtype: np.dtype, *, tempered: bool) -> KL:
    """log beams + b·log n of blocks b [B]: as many copies of a response are expected among all texts that are written,
    n continuations for each one that is kept, as exp of that times its probability."""
    value = (math.log(beams) + blocks * math.log(n)).astype(jnp.promote_types(dtype, jnp.float32))
    return KL(value, "bound", "bound log(G W) + b log N", _reference(tempered))


def selection_bound(n: int) -> float:
    """log n − (n−1)/n: the most that the best of n draws can differ from one draw, in nats."""
    return math.log(n) - (n - 1) / n


def surprise_of_tries(tries: Array, most: int, dtype: np.dtype) -> Array:
    """1 + 1/2 + … + 1/(tries−1): its mean is −log a where each of the tries [B] >= 1 passes with probability a."""
    harmonic = jnp.cumsum(jnp.concatenate([jnp.zeros(1), 1 / jnp.arange(1.0, most + 1)]))
    return harmonic[jnp.clip(tries - 1, 0, most)].astype(jnp.promote_types(dtype, jnp.float32))


def rejection_estimate(excess: Array, accepted: Array, tries: Array, most: int) -> KL:
    """E[r]/beta − log Z of draws accepted with probability exp(excess [B]), excess = (r − bound)/beta; NaN in rows that
    accepted none, whose law is another."""
    value = excess + surprise_of_tries(tries, most, excess.dtype)
    return KL(jnp.where(accepted, value, jnp.nan), "estimate", "estimate r/beta - log Z", "policy")


def threshold_estimate(accepted: Array, tries: Array, most: int, dtype: np.dtype) -> KL:
    """−log Pr(r >= threshold) in the mean over draws; in rows that reached no threshold the bound of the best of
    `most`."""
    value = jnp.where(accepted, surprise_of_tries(tries, most, dtype), selection_bound(most))
    formula = "estimate -log Pr(r >= threshold)"
    return KL(value.astype(jnp.promote_types(dtype, jnp.float32)), "estimate", formula, "policy")


def gibbs_estimate(value: Array) -> KL:
    """E[r]/beta − log Z [B] under the weights of particles."""
    return KL(value, "estimate", "estimate E[r]/beta - log Z")


def segments_bound(value: Array, *, tempered: bool) -> KL:
    """Σ over segments of −log Pr(a proposal passes), [B], estimated from the tries of each."""
    formula = "estimated bound, sum over segments of -log(share that passes)"
    return KL(value, "estimated_bound", formula, _reference(tempered))


def unknown(like: Array, *, tempered: bool) -> KL:
    """NaN for each entry of like [B]: no number is known."""
    value = jnp.full(like.shape, jnp.nan, jnp.promote_types(like.dtype, jnp.float32))
    return KL(value, "unknown", "unknown", _reference(tempered))

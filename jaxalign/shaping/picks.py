"""Scalars whose gradient is the leader's through rules that pick one of several draws: best-of-n, hard and soft.

The hard pick has no derivative in the scores that it picks by: it is 0 almost everywhere and jumps at ties. It has one
in the policy that draws (`best_of_score`); a soft pick has one in the scores (`soft_pick`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32, centred, middle
from jaxalign._checks import check_count, check_positive
from jaxalign.shapes import Numbers, Samples, Scalar
from jaxalign.shaping.leader import leader_utility
from jaxalign.shaping.surrogates import check_draws, check_shape
from jaxalign.types import Array, ArrayLike


def best_of_score(log_prob: Samples, *, judge: ArrayLike, utility: ArrayLike, n: int) -> Scalar:
    """Gives a number whose gradient is that of best-of-n's utility in the policy that draws, the judge held fixed.

    Over all subsets of n among N >= n draws (a U-statistic): unbiased. Sorted by the judge's score, the weight of draw
    i is Σ_{j<i} C(j, n−2)·(u_i − u_j)/C(N, n): its share as the best and below better ones, less what the subset
    would have had without it. For n = 1 it is `score_function`.

    Args:
      log_prob: [...,N], log pi(y_i) of whole draws.
      judge: [...,N], scores by which best-of-n picks; the first among equals, as `decoding.best_of_n`.
      utility: [...,N] of the draws.
      n: of the best-of-n, >= 1.

    Returns:
      A scalar, the mean over prompts of Σ_i sg(weight_i)·log pi(y_i).

    Raises:
      ValueError: n below 1, fewer than max(n, 2) draws, another shape.
    """
    check_count("n", n, least=1)
    log_prob, judge, utility = map(at_least_float32, (log_prob, judge, utility))
    total = check_draws("utility", utility, max(n, 2))
    for name, array in (("log_prob", log_prob), ("judge", judge)):
        check_shape(name, array, "utility", utility.shape)
    weight = jax.lax.stop_gradient(_best_of_weights(judge, utility, n, total))
    return (weight * log_prob).sum(axis=-1).mean()


def best_of_utility(judge: ArrayLike, *, utility: ArrayLike, n: int) -> Numbers:
    """Gives the unbiased estimate of best-of-n's utility from N >= n draws, the mean over all subsets of n.

    Args:
      judge: [...,N], scores by which best-of-n picks; the first among equals.
      utility: [...,N].
      n: >= 1.

    Returns:
      [...], Σ_i C(i, n−1)·u_i/C(N, n) over draws sorted by the judge, in units of u.

    Raises:
      ValueError: n below 1, fewer than n draws, another shape.
    """
    check_count("n", n, least=1)
    judge, utility = at_least_float32(judge), at_least_float32(utility)
    total = check_draws("utility", utility, n)
    check_shape("judge", judge, "utility", utility.shape)
    best = np.asarray([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
    offset = middle(utility)[..., 0]
    ranked = jnp.take_along_axis(utility, _ascending(judge), axis=-1) - offset[..., None]
    return offset + (ranked * best).sum(axis=-1)


def _ascending(judge: Array) -> Array:
    """The order [...,N] by score, in which the first among equals comes last."""
    return jnp.argsort(-judge, axis=-1, stable=True)[..., ::-1]


def _best_of_weights(judge: Array, utility: Array, n: int, total: int) -> Array:
    if n == 1:
        return centred(utility) / (total - 1)
    order = _ascending(judge)
    ranked = jnp.take_along_axis(utility - middle(utility), order, axis=-1)
    # In Python's integers: the binomials of a few hundred draws are above any float.
    below = np.asarray([math.comb(j, n - 2) / math.comb(total, n) for j in range(total)])
    before = jnp.cumsum(below * ranked, axis=-1) - below * ranked
    weight = (np.cumsum(below) - below) * ranked - before
    return jnp.take_along_axis(weight, jnp.argsort(order, axis=-1), axis=-1)


def soft_pick(reward: Samples, *, utility: ArrayLike, temperature: ArrayLike) -> Scalar:
    """Gives what a soft best-of-n delivers on given draws, in which its own gradient is that of the rule's utility.

    The rule draws n responses of the base and keeps one with probability softmax(r/temperature): the best one as the
    temperature falls to 0, where no gradient is left. It has no bias for this rule.

    Args:
      reward: [...,n], r_phi of n draws of the base.
      utility: [...,n].
      temperature: > 0, in units of reward, scalar or [...].

    Returns:
      A scalar, the mean over prompts of Σ_i softmax(r/temperature)_i·u_i, in units of u.

    Raises:
      ValueError: temperature <= 0, another shape.
    """
    check_positive("temperature", temperature)
    reward, utility = at_least_float32(reward), at_least_float32(utility)
    check_shape("reward", reward, "utility", utility.shape)
    return leader_utility(jnp.zeros_like(reward), reward, utility=utility, beta=temperature).mean()

"""Scalars whose gradient estimates the leader's: for followers that are sampled and not enumerated.

U(phi) = E_follower[u], u the leader's utility of a response. Each function takes numbers of responses that were drawn
from a follower and gives a scalar; `jax.grad` of it with respect to what the follower depends on is the estimate of
dU/dphi. The draws themselves are never differentiated. `score_function` in `leader` is the plainest of them; docs/
bilevel.md derives all. Arrays have the draws of a prompt on their last axis, or its tokens where they are of tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32, centred, is_supported, middle
from jaxalign._checks import check_count, check_positive
from jaxalign.shapes import Numbers, Samples, Scalar
from jaxalign.shaping.leader import leader_utility
from jaxalign.types import Array, ArrayLike


def check_shape(name: str, value: Array, other: str, expected: tuple[int, ...]) -> None:
    """ValueError naming both arrays unless value has the shape of the other."""
    if value.shape != expected:
        raise ValueError(f"{name}: expected the shape of {other}, {expected}, found {value.shape}")


def check_draws(name: str, value: Array, least: int = 2) -> int:
    """The number of draws on the last axis; ValueError below the least."""
    n = value.shape[-1] if value.ndim else 0
    if n < least:
        raise ValueError(f"{name}: expected at least {least} draws on the last axis, found {n}")
    return n


def covariance(reward: Samples, *, utility: ArrayLike, beta: ArrayLike) -> Scalar:
    """Gives a number whose gradient in the reward is that of U, for draws of the exact follower pi ∝ base·exp(r/beta).

    dU/dphi = Cov_pi(u, dr/dphi)/beta: the decoder is not differentiated, only the reward. The sample covariance over
    n − 1 is unbiased. For draws of an approximate follower it is the gradient of another game.

    Args:
      reward: [...,n], r_phi of n >= 2 exact draws (`decoding.rejection`; tokens under exact soft or exceedance values).
      utility: [...,n] of the same draws, in units of u.
      beta: the follower's KL weight > 0, scalar or [...].

    Returns:
      A scalar, the mean over prompts of mean_i sg(u_i − mean of the others)·r_i/beta.

    Raises:
      ValueError: fewer than 2 draws, another shape, beta <= 0.
    """
    check_positive("beta", beta)
    reward, utility, beta = map(at_least_float32, (reward, utility, beta))
    n = check_draws("utility", utility)
    check_shape("reward", reward, "utility", utility.shape)
    advantage = jax.lax.stop_gradient(centred(utility) * (n / (n - 1)))
    return (advantage * reward / (beta[..., None] if beta.ndim else beta)).mean()


def togo(log_prob: Array, *, q: ArrayLike, value: ArrayLike, mask: ArrayLike) -> Scalar:
    """Gives a number whose gradient is that of U, from values of u under the follower in place of u itself.

    It is the mean over responses of Σ_t sg(Q_u(s_t,z_t) − V_u(s_t))·log pi(z_t|s_t): unbiased if the values are exact.

    Args:
      log_prob: [...,T], log pi(z_t|s_t) of drawn tokens.
      q: [...,T], Q_u(s_t,z_t): the expected utility after the token.
      value: [...,T], V_u(s_t): that before it.
      mask: [...,T] bool, True on real tokens.

    Returns:
      A scalar.

    Raises:
      ValueError: arrays of another shape than log_prob.
    """
    log_prob, q, value = map(at_least_float32, (log_prob, q, value))
    real = jnp.asarray(mask, bool)
    for name, array in (("q", q), ("value", value), ("mask", real)):
        check_shape(name, array, "log_prob", log_prob.shape)
    advantage = jax.lax.stop_gradient(jnp.where(real, q - value, 0))
    return jnp.where(real, advantage * jnp.where(real, log_prob, 0), 0).sum(axis=-1).mean()


def all_tokens(
    log_prob_all: Array,
    *,
    q: ArrayLike,
    log_prob: Array,
    chosen_q: ArrayLike,
    utility: ArrayLike,
    mask: ArrayLike,
    corrected: bool = True,
) -> Scalar:
    """Gives a number whose gradient is that of U, summed over all next tokens of the states that were visited.

    Its gradient is the mean over responses of Σ_t Σ_z dpi(z|s_t)·Q(s_t,z) + Σ_t (u − Q(s_t,z_t))·d log pi(z_t|s_t). The
    second sum makes it unbiased whatever Q is, at the variance of u − Q; where Q is 0 the whole is the score function
    without a baseline. Without it the bias is that of Q, none where Q is exact, and the variance is the least of all.

    Args:
      log_prob_all: [...,T,K], log pi(z|s_t) of all tokens, or of all that have mass.
      q: [...,T,K], an estimate of the expected utility after each; no gradient goes through it.
      log_prob: [...,T], log pi of the drawn tokens.
      chosen_q: [...,T], q of the drawn tokens.
      utility: [...] of the responses, in units of u.
      mask: [...,T] bool, True on real tokens.
      corrected: False leaves the second sum out, for a Q that is exact.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that do not fit.
    """
    log_prob_all, q, log_prob = at_least_float32(log_prob_all), at_least_float32(q), at_least_float32(log_prob)
    chosen_q, utility, real = at_least_float32(chosen_q), at_least_float32(utility), jnp.asarray(mask, bool)
    check_shape("q", q, "log_prob_all", log_prob_all.shape)
    check_shape("log_prob", log_prob, "log_prob_all without its last axis", log_prob_all.shape[:-1])
    for name, array in (("chosen_q", chosen_q), ("mask", real)):
        check_shape(name, array, "log_prob", log_prob.shape)
    check_shape("utility", utility, "log_prob without its last axis", log_prob.shape[:-1])
    inside = is_supported(log_prob_all) & real[..., None]
    # Σ_z dpi is 0: an offset of q changes nothing but digits.
    q = jnp.where(inside, jax.lax.stop_gradient(q), 0)
    prob = jnp.where(inside, jnp.exp(jnp.where(inside, log_prob_all, 0)), 0)
    each = (prob * q).sum(axis=-1)
    if corrected:
        rest = jax.lax.stop_gradient(jnp.where(real, utility[..., None] - chosen_q, 0))
        each = each + rest * jnp.where(real, log_prob, 0)
    return each.sum(axis=-1).mean()


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


class WeightedEstimate(NamedTuple):
    """Estimates from weighted responses, each differentiable in the reward."""

    utility: Numbers
    """[...], Σ_i w̄_i·u_i in units of u; bias O(1/n)."""
    partition: Numbers
    """[...], Ẑ: unbiased, and so is its gradient."""
    log_partition: Numbers
    """[...], log Ẑ in nats; bias O(1/n)."""
    effective_samples: Numbers
    """[...], from 1 to n."""


def smc(reward: Samples, *, log_weight: ArrayLike, utility: ArrayLike, beta: ArrayLike) -> WeightedEstimate:
    """Gives estimates of sequential Monte Carlo that carry the derivatives in the terminal reward.

    For any fixed proposal, twist and resampling the mean of the weights is unbiased for Z(phi) at every phi, so that
    dẐ = mean_i w_i·dr_i/beta is for dZ. Ratios are so up to O(1/n): dU ≈ Cov_w̄(u, dr)/beta, d log Z ≈ Σ w̄·dr/beta.
    At high gain and few particles that bias is large, and towards 0.

    Args:
      reward: [...,n], r_phi of the particles, differentiated.
      log_weight: [...,n], of the particles, the reward's share in it (SMCInfo.log_weight); no gradient goes through it.
      utility: [...,n].
      beta: > 0, scalar or [...].

    Returns:
      A WeightedEstimate.

    Raises:
      ValueError: no particle, beta <= 0, another shape.
    """
    check_positive("beta", beta)
    reward, log_weight, utility, beta = map(at_least_float32, (reward, log_weight, utility, beta))
    n = check_draws("reward", reward, 1)
    for name, array in (("log_weight", log_weight), ("utility", utility)):
        check_shape(name, array, "reward", reward.shape)
    scaled = reward / (beta[..., None] if beta.ndim else beta)
    moved = jax.lax.stop_gradient(log_weight) + (scaled - jax.lax.stop_gradient(scaled))
    log_mean = jax.nn.logsumexp(moved, axis=-1) - math.log(n)
    share = jax.nn.softmax(moved, axis=-1)
    size = 1 / (jax.lax.stop_gradient(share) ** 2).sum(axis=-1)
    return WeightedEstimate((share * utility).sum(axis=-1), jnp.exp(log_mean), log_mean, size)

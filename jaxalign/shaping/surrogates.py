"""Scalars whose gradient estimates the leader's: for followers that are sampled and not enumerated.

U(phi) = E_follower[u], u the leader's utility of a response. Each function takes numbers of responses that were drawn
from a follower and gives a scalar; `jax.grad` of it with respect to what the follower depends on is the estimate of
dU/dphi. The draws themselves are never differentiated. `score_function` in `leader` is the plainest of them, and
docs/bilevel.md derives all. Arrays have the draws of a prompt on their last axis, or its tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32, is_supported
from jaxalign._arrays import centred as without_mean
from jaxalign._checks import check_positive
from jaxalign.shapes import Numbers, Samples, Scalar
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
    advantage = jax.lax.stop_gradient(without_mean(utility) * (n / (n - 1)))
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


def nudged(
    reward: Samples,
    other: Samples,
    *,
    multiplier: float,
    log_weight: ArrayLike = 0.0,
    other_log_weight: ArrayLike = 0.0,
    centred: bool = False,
) -> Scalar:
    """Gives a number whose gradient is that of U, from two trainings of the follower: with r, and with r nudged by u.

    The value-function penalty, max over theta of U − multiplier·(max J − J), has the follower of the reward
    r + u/multiplier, so that dU/dphi ≈ multiplier·(E_nudged[dr/dphi] − E_follower[dr/dphi]). Centred, of followers of
    r ± u/multiplier, at half that factor, the bias falls as 1/multiplier²; the noise of separate draws grows like the
    multiplier. Common draws of the follower itself, re-weighted by ±u/(multiplier·beta), have no such noise, and give
    `covariance` as the multiplier grows.

    Args:
      reward: [...,n], r_phi of draws of the follower trained with r + u/multiplier.
      other: [...,m], r_phi of draws of the follower of r, or with `centred` of r − u/multiplier.
      multiplier: > 0, in units of u per unit of reward; well above range(u)/beta.
      log_weight: [...,n], log weights of the first draws; 0: equal ones.
      other_log_weight: [...,m], of the others.
      centred: whether the second follower was nudged the other way.

    Returns:
      A scalar, the mean over prompts.

    Raises:
      ValueError: multiplier <= 0, log weights of another shape.
    """
    check_positive("multiplier", multiplier)
    means = []
    for name, values, weight in (("log_weight", reward, log_weight), ("other_log_weight", other, other_log_weight)):
        values, weight = at_least_float32(values), at_least_float32(weight)
        weight = jnp.broadcast_to(weight, values.shape) if np.ndim(weight) == 0 else weight
        check_shape(name, weight, "its rewards", values.shape)
        share = jax.lax.stop_gradient(jax.nn.softmax(weight, axis=-1))
        means.append((share * values).sum(axis=-1).mean())
    return multiplier * (means[0] - means[1]) / (2 if centred else 1)

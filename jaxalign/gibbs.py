"""Closed-form KL-regularised policies over a finite set: pi ∝ base·exp(reward/beta), over the last axis.

max over pi of E_pi[r] − beta·KL(pi‖base) is attained by this policy; the maximum is `log_partition`·beta. Entries of
the base that are −inf (or types.NEGATIVE) are outside its support, whatever their reward, and get no gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported, with_root_derivatives
from jaxalign._checks import check_positive, is_concrete
from jaxalign.shapes import Numbers, Outcomes
from jaxalign.types import Array, ArrayLike

__all__ = [
    "kl",
    "log_partition",
    "log_policy",
    "match_kl",
    "utility",
]

_FLOOR = 1e-6  # of the range of the reward: the clamp of match_kl


def _tilted(log_base: ArrayLike, reward: ArrayLike, beta: ArrayLike) -> tuple[Array, Array, Array]:
    """(logit [...,K] with NEGATIVE outside the support, shift/beta [...], support): log base + (reward − max)/beta.

    The maximum over the support is taken out before dividing by beta: at beta = 1e-4 reward/beta alone would lose all
    its digits in float32.
    """
    log_base, reward, beta = at_least_float32(log_base), at_least_float32(reward), at_least_float32(beta)
    inside = is_supported(log_base)
    shift = jax.lax.stop_gradient(jnp.where(inside, reward, -jnp.inf).max(axis=-1, keepdims=True))
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    scale = beta[..., None] if beta.ndim else beta
    safe = jnp.where(inside, reward, shift)
    logit = jnp.where(inside, jnp.where(inside, log_base, 0) + (safe - shift) / scale, NEGATIVE)
    return logit, (shift / scale)[..., 0], inside


def log_policy(log_base: ArrayLike, reward: ArrayLike, *, beta: ArrayLike) -> Outcomes:
    """Gives the tilted policy, log pi(y) = log base(y) + r(y)/beta − log Z.

    Args:
      log_base: [...,K], log-probabilities of the base, normalised or not.
      reward: [...,K].
      beta: the KL weight > 0, scalar or [...], in units of reward per nat.

    Returns:
      [...,K], in nats; NEGATIVE outside the support of the base.

    Raises:
      ValueError: on concrete values, beta <= 0.
    """
    check_positive("beta", beta)
    logit, _, inside = _tilted(log_base, reward, beta)
    return jnp.where(inside, logit - jax.nn.logsumexp(logit, axis=-1, keepdims=True), NEGATIVE)


def log_partition(log_base: ArrayLike, reward: ArrayLike, *, beta: ArrayLike) -> Numbers:
    """Gives log Z = log Σ_y base(y)·exp(r(y)/beta); beta·log Z is the soft value of the reward.

    Args:
      log_base: [...,K], log-probabilities of the base; one that is not normalised adds the log of its sum.
      reward: [...,K].
      beta: the KL weight > 0, scalar or [...], in units of reward per nat.

    Returns:
      [...], in nats.

    Raises:
      ValueError: on concrete values, beta <= 0.
    """
    check_positive("beta", beta)
    logit, shift, _ = _tilted(log_base, reward, beta)
    return jax.nn.logsumexp(logit, axis=-1) + shift


def kl(log_p: ArrayLike, log_q: ArrayLike) -> Numbers:
    """Gives KL(p‖q) = Σ p·(log p − log q), with 0·log 0 = 0.

    Args:
      log_p: [...,K], normalised.
      log_q: [...,K], normalised.

    Returns:
      [...], in nats; inf where p has mass outside the support of q.
    """
    log_p, log_q = at_least_float32(log_p), at_least_float32(log_q)
    inside = is_supported(log_p)
    outside = inside & ~is_supported(log_q) & (log_p > -80)
    safe_p, safe_q = jnp.where(inside, log_p, 0), jnp.where(inside & is_supported(log_q), log_q, 0)
    total = jnp.where(inside, jnp.exp(safe_p) * (safe_p - safe_q), 0).sum(axis=-1)
    return jnp.where(outside.any(axis=-1), jnp.inf, total)


def utility(log_p: ArrayLike, utility: ArrayLike) -> Numbers:
    """Gives the expected utility, E_p[u] = Σ p·u.

    Args:
      log_p: [...,K], normalised.
      utility: [...,K]; entries outside the support of p may hold anything, NaN included.

    Returns:
      [...], in units of u.
    """
    log_p = at_least_float32(log_p)
    inside = is_supported(log_p)
    weight = jnp.where(inside, jnp.exp(jnp.where(inside, log_p, 0)), 0)
    return (weight * jnp.where(inside, at_least_float32(utility), 0)).sum(axis=-1)


def match_kl(log_base: ArrayLike, reward: ArrayLike, *, kl: ArrayLike) -> Numbers:
    """Gives the beta at which the tilted policy has a given KL to its base, KL(pi_beta‖base) = kl.

    KL falls from −log base(best) at beta -> 0 to 0 at beta -> inf, so the root is unique; it is bracketed and bisected
    in log beta. Its derivatives are those of the implicit function (with t = 1/beta, dKL/dt = t·Var_pi(r)), in both
    modes, up to the third.

    Args:
      log_base: [...,K], log-probabilities of the base; normalised inside.
      reward: [...,K].
      kl: the budget > 0, scalar or [...], in nats.

    Returns:
      beta [...], in units of reward per nat. A budget at or above −log base(best), base(best) the mass of all responses
      of highest reward, has no root: the result is the clamp 1e-6·(range of the reward over the support), with zero
      gradient. A constant reward has no root either and no scale: the result is 1, with zero gradient.

    Raises:
      ValueError: on concrete values, a budget that is not > 0 or not finite.
    """
    check_positive("kl", kl)
    if is_concrete(kl) and not np.all(np.isfinite(np.asarray(kl))):
        raise ValueError(f"kl: expected a finite budget, found {np.asarray(kl)}")
    log_base, reward, kl = at_least_float32(log_base), at_least_float32(reward), at_least_float32(kl)
    kl = jnp.broadcast_to(kl, jnp.broadcast_shapes(log_base.shape, reward.shape)[:-1])
    log_base, reward = jnp.broadcast_arrays(log_base, reward)
    result: Array = _match_kl(log_base, reward, kl.astype(jnp.result_type(log_base, reward)))
    return result


def _kl_of(log_base: Array, reward: Array, t: Array) -> Array:
    """KL(pi_{1/t}‖base) of a normalised base [...,K] at t [...], as Σ base·(d·e^d − e^d + 1), d = log(pi/base): every
    term is >= 0, so that a small KL keeps its digits in float32."""
    inside = is_supported(log_base)
    scaled = jnp.where(inside, t[..., None] * jnp.where(inside, reward, 0), 0)
    logit = jnp.where(inside, jnp.where(inside, log_base, 0) + scaled, NEGATIVE)
    log_z = jax.nn.logsumexp(logit, axis=-1, keepdims=True)
    d = jnp.where(inside, scaled - log_z, 0)
    # The derivatives of the first terms that are left out are below 1e-11 where the series serves.
    series = d**2 * (1 / 2 + d * (1 / 3 + d * (1 / 8 + d * (1 / 30 + d * (1 / 144 + d / 840)))))
    small = jnp.abs(d) < 1e-2
    wide = jnp.where(small, 0, d)
    term = jnp.where(small, jnp.exp(jnp.where(inside, log_base, 0)) * series, 0)
    weight = jnp.exp(jnp.where(inside, log_base, 0) + wide)
    term += jnp.where(small, 0, weight * wide - weight + jnp.exp(jnp.where(inside, log_base, 0)))
    return jnp.where(inside, term, 0).sum(axis=-1)


def _root(log_base: Array, reward: Array, kl: Array) -> tuple[Array, Array]:
    """(log t, t = 1/beta, has_root) for a normalised base and a reward shifted and scaled to [-1, 0] on the support."""
    best = is_supported(log_base) & (reward >= 0)
    log_mass = jax.nn.logsumexp(jnp.where(best, log_base, NEGATIVE), axis=-1)
    # The limit is known to a few units in the last place: a budget that near to it counts as at the limit.
    slack = 8 * jnp.finfo(log_base.dtype).eps * jnp.maximum(-log_mass, 1)
    has_root = kl < -log_mass - slack
    # In log t: at 1e-7 the KL is below 1e-14; at 1e6 every response short of the best by 1e-4 is gone.
    low = jnp.full(kl.shape, jnp.log(1e-7), log_base.dtype)
    high = jnp.full(kl.shape, jnp.log(1 / _FLOOR), log_base.dtype)
    has_root &= _kl_of(log_base, reward, jnp.exp(high)) > kl

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        below = _kl_of(log_base, reward, jnp.exp(middle)) < kl
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    # 64 halvings of a bracket of 30 reach the last bit of float64; the loop is a few dozen short sums.
    low, high = jax.lax.fori_loop(0, 64, halve, (low, high))
    return (low + high) / 2, has_root


@jax.jit  # op by op, each call would compile the loop anew
def _match_kl(log_base: Array, reward: Array, kl: Array) -> Array:
    inside = is_supported(log_base)
    log_base = jnp.where(inside, log_base, NEGATIVE)
    log_base = jnp.where(inside, log_base - jax.nn.logsumexp(log_base, axis=-1, keepdims=True), NEGATIVE)
    # Shift and unit are constants of the problem: beta and its derivatives are the same whatever they are.
    constant = jax.lax.stop_gradient(reward)
    top = jnp.where(inside, constant, -jnp.inf).max(axis=-1, keepdims=True)
    spread = top - jnp.where(inside, constant, jnp.inf).min(axis=-1, keepdims=True)
    scaled = jnp.where(inside, (reward - top) / jnp.where(spread > 0, spread, 1), 0)
    spread = spread[..., 0]
    log_t, has_root = _root(*jax.lax.stop_gradient((log_base, scaled, kl)))
    has_root &= spread > 0

    def step(log_t: Array) -> Array:
        """dKL/dlog t = Var_pi(t·r)."""
        theta = scaled * jnp.exp(log_t)[..., None]
        p = jnp.where(inside, jnp.exp(jax.nn.log_softmax(log_base + theta, axis=-1)), 0)
        slope = (p * (theta - (p * theta).sum(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
        return (kl - _kl_of(log_base, scaled, jnp.exp(log_t))) / jnp.where(slope > 0, slope, 1)

    log_t = with_root_derivatives(jnp.where(has_root, log_t, 0), step)
    return jnp.where(spread > 0, jnp.where(has_root, spread * jnp.exp(-log_t), _FLOOR * spread), 1.0)

"""Functions that make one score of those of several critics or rewards, for `critics.pool` and `rewards.pool`.

Each is f(pool_params, scores [B,m,K], log_prob [B,K], index [B]) -> [B,K] over critics, and the first three are
f(pool_params, rewards [N,m], index [N]) -> [N] over rewards too. Over one reward model the lower bound is that model;
over an ensemble it is pessimistic where its members disagree.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported, log_mean_exp, look_up, with_root_derivatives
from jaxalign._builders import cached
from jaxalign._checks import check_positive, entry
from jaxalign.shapes import LogProbs, PromptIndex, Scores
from jaxalign.types import Array, Params

__all__ = [
    "MemberPool",
    "ScorePool",
    "lower_bound",
    "minimum",
    "soft_minimum",
    "worst_case",
]

_STEPS = 60  # of the interior-point method, with room: what is left after it is rounding, also on faces


class MemberPool(Protocol):
    """One number of m, over the second axis: (pool_params, scores [B,m,...], …) -> [B,...]."""

    def __call__(self, pool_params: Params, scores: Array, /, *rest: Any) -> Array: ...


class ScorePool(Protocol):
    """Scores [B,K] of m critics' [B,m,K]. log_prob [B,K]: of the candidates under the policy below; index [B]: the
    prompt's row in its set."""

    def __call__(self, pool_params: Params, scores: Array, log_prob: LogProbs, index: PromptIndex, /) -> Scores: ...


def minimum(pool_params: Params, scores: Array, /, *rest: Any) -> Array:
    """Gives the least of the members' scores.

    Args:
      pool_params: not read.
      scores: [B,m,...].
      rest: not read.

    Returns:
      [B,...].
    """
    return scores.min(axis=1)


@cached
def lower_bound(k: float) -> MemberPool:
    """Builds the mean of the members less k standard deviations of the population, a lower confidence bound.

    Args:
      k: >= 0; 0 is the mean.

    Returns:
      A function for `critics.pool` and `rewards.pool`. Where the members agree its derivative is that of the mean.
      Where one of them is log 0 it is log 0.

    Raises:
      ValueError: k < 0.
    """
    if not k >= 0:
        raise ValueError(f"k: expected a number >= 0, found {k!r}")

    def bound(pool_params: Params, scores: Array, /, *rest: Any) -> Array:
        inside = is_supported(scores).all(axis=1)
        scores = jnp.where(inside[:, None], scores, 0)  # the square of log 0 overflows
        mean = scores.mean(axis=1)
        variance = ((scores - mean[:, None]) ** 2).mean(axis=1)
        some = variance > 0
        return jnp.where(inside, mean - k * jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1)), 0), NEGATIVE)

    return bound


@cached
def soft_minimum(tau: float) -> MemberPool:
    """Builds −tau·log mean_i exp(−q_i/tau), between the least (tau -> 0) and the mean (tau -> inf).

    Args:
      tau: > 0, in units of the score.

    Returns:
      A function for `critics.pool` and `rewards.pool`.

    Raises:
      ValueError: tau <= 0.
    """
    check_positive("tau", tau)

    def soft(pool_params: Params, scores: Array, /, *rest: Any) -> Array:
        scores = jnp.moveaxis(scores, 1, -1)
        least = scores.min(axis=-1, keepdims=True)
        log_share = jnp.full(scores.shape, -math.log(scores.shape[-1]), scores.dtype)
        return least[..., 0] - tau * log_mean_exp(log_share, (least - scores) / tau)

    return soft


@cached
def worst_case() -> ScorePool:
    """Builds the score of robust multi-objective decoding, q = Σ_g w_g·V_g with the worst weights of the simplex (RMOD,
    arXiv 2503.08796):

        max_pi min_w (Σ_g w_g·E_pi[V_g])/beta − KL(pi‖pi_ref),   w = argmin_w D(w),
        D(w) = log Σ_z pi_ref(z)·exp(Σ_g w_g·V_g(z)/beta)

    At the solution E[V_g] is the same for all g of weight > 0 and no smaller for the others, E under the tilt, and D is
    min_g E[V_g]/beta − KL. D is convex: an interior-point method in w finds it, and the derivatives of w are those of
    the implicit function on the face of the weights that are not 0. m numbers are solved for at each state, over sums
    of m·K.

    pool_params: {"beta"}, that of the tilt: a number, or a table [N] by the prompt's index. The pool does not see the
    tilt's: give one array to both, `TiltParams(base, PoolParams(values, {"beta": beta}), beta)`, and the derivative in
    beta is that of the whole. At another beta the weights are those of another problem, and nothing tells. A blockwise
    search, which has no beta, takes the one given here.

    Returns:
      A function for `critics.pool`.
    """
    return _worst_case


def _worst_case(pool_params: Params, scores: Array, log_prob: LogProbs, index: PromptIndex, /) -> Scores:
    beta = at_least_float32(entry(pool_params, "beta"))
    beta = jnp.broadcast_to(look_up(beta, index, name="pool: beta") if beta.ndim else beta, index.shape)
    inside = is_supported(log_prob) & is_supported(scores).all(axis=1)
    theta = jnp.where(inside[:, None], scores, 0) / beta[:, None, None]
    log_base = jnp.where(inside, log_prob, NEGATIVE)
    weights = jax.vmap(worst_weights)(theta, log_base)
    q = (weights[..., None] * scores).sum(axis=1)
    return jnp.where(is_supported(scores).all(axis=1), q, NEGATIVE)


def worst_weights(theta: Array, log_base: Array) -> Array:
    """The weights w [m] of the simplex that minimise log Σ_z exp(log_base [K] + Σ_g w_g·theta_g(z)), theta [m,K]; with
    the derivatives of the implicit function on the face of those > 0."""
    members = theta.shape[0]
    eps = jnp.finfo(theta.dtype).eps

    def moments(w: Array) -> tuple[Array, Array]:
        """Mean [m] and covariance [m,m] of theta under the tilt: gradient and Hessian of D."""
        p = jax.nn.softmax(log_base + w @ theta)
        mean = theta @ p
        centred = theta - mean[:, None]
        return mean, (centred * p) @ centred.T

    size = jax.lax.stop_gradient(jnp.abs(theta).max()) + jnp.finfo(theta.dtype).tiny

    def kkt(hessian: Array, right: Array, total: Array) -> Array:
        """dw of the equations hessian·dw + y = right, Σ dw = total."""
        ridge = 8 * eps * (jnp.trace(hessian) + eps * size) + jnp.finfo(theta.dtype).tiny
        ones = jnp.ones((members, 1), theta.dtype)
        top = jnp.concatenate([hessian + ridge * jnp.eye(members, dtype=theta.dtype), size * ones], axis=1)
        bottom = jnp.concatenate([size * ones.T, jnp.zeros((1, 1), theta.dtype)], axis=1)
        solved = jnp.linalg.solve(
            jnp.concatenate([top, bottom]), jnp.concatenate([right, size * jnp.reshape(total, (1,))])
        )
        dw: Array = solved[:members]
        return dw

    def longest(x: Array, dx: Array) -> Array:
        """The most of a step dx that keeps x > 0, at most 1."""
        return jnp.where(dx < 0, -0.95 * x / jnp.where(dx < 0, dx, -1), 1).min()

    def inner(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """One step of the primal-dual method: w·s -> mu, s the gradient less its least."""
        w, s = state
        mean, covariance = jax.lax.stop_gradient(moments(w))
        mu = 0.1 * (w * s).mean()
        # The multiplier y is eliminated by `kkt`; s + ds = mu/w − (s/w)·dw.
        dw = kkt(covariance + jnp.diag(s / w), mu / w - mean, 1 - w.sum())
        ds = mu / w - s - s / w * dw
        step = jnp.minimum(longest(w, dw), longest(s, ds))
        floor = eps**2
        return jnp.maximum(w + step * dw, floor), jnp.maximum(s + step * ds, floor * size)

    w0 = jnp.full(members, 1 / members, theta.dtype)
    start = w0, jnp.full(members, size, theta.dtype)
    w, s = jax.lax.fori_loop(0, _STEPS, inner, start)
    active = w * size > s
    active |= ~active.any()

    def on_face(w: Array) -> Array:
        """The Newton step of D on the face of the weights that are not 0."""
        mean, covariance = moments(w)
        both = active[:, None] & active[None, :]
        level = jnp.where(active, mean, 0).sum() / active.sum()
        # A weight that is 0 stays 0: its row and column are those of the identity.
        hessian = jnp.where(both, covariance, 0)
        scale = jnp.trace(hessian) + eps * size
        hessian = hessian + jnp.diag(jnp.where(active, 0, scale))
        right = jnp.where(active, level - mean, 0)
        ridge = 8 * eps * scale * jnp.eye(members, dtype=theta.dtype)
        ones = jnp.where(active, scale, 0)[:, None]
        matrix = jnp.block([[hessian + ridge, ones], [ones.T, jnp.zeros((1, 1), theta.dtype)]])
        dw: Array = jnp.linalg.solve(matrix, jnp.concatenate([right, jnp.zeros(1, theta.dtype)]))[:members]
        return dw

    w = jnp.where(active, w, 0)
    w = jax.lax.stop_gradient(w / w.sum())
    for _ in range(3):  # to the last digits, where they do not leave the simplex
        moved = jnp.maximum(w + jax.lax.stop_gradient(on_face(w)), 0)
        w = moved / moved.sum()
    return with_root_derivatives(w, on_face)

"""What the leader pays where beta is not known, and under a budget of KL besides the bound of the reward."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import gibbs
from jaxalign._arrays import NEGATIVE, at_least_float32, column, with_root_derivatives
from jaxalign._checks import check_positive, is_concrete
from jaxalign.shapes import Numbers, Samples
from jaxalign.shaping.threshold import normalised_weights, optimal_threshold, threshold_reward
from jaxalign.types import Array, ArrayLike

_HALVINGS = 64


def robust_threshold(
    utility: ArrayLike,
    *,
    log_base: ArrayLike | None = None,
    bound: ArrayLike,
    beta_high: ArrayLike,
    beta_low: ArrayLike | None = None,
) -> Numbers:
    """Gives the threshold that is best in the worst case over the follower's beta in an interval.

    For rewards that rise with u, dU/d(1/beta) = Cov_pi(u, r) >= 0, so that the worst beta is the highest, and the
    threshold reward at gain bound/beta_high is optimal. The threshold is also the utility that is guaranteed.

    Args:
      utility: [...,n], of one prompt's responses or samples.
      log_base: [...,n], log weights; None: n samples of equal weight.
      bound: B > 0, of the reward, scalar or [...].
      beta_high: the highest beta of the follower, > 0, scalar or [...].
      beta_low: the lowest, read for the check alone; None: any.

    Returns:
      [...], in units of u: m*(bound/beta_high), as `optimal_threshold`.

    Raises:
      ValueError: bound or a beta <= 0, beta_high below beta_low, and those of `optimal_threshold`.
    """
    check_positive("bound", bound)
    check_positive("beta_high", beta_high)
    if beta_low is not None:
        check_positive("beta_low", beta_low)
        if is_concrete(beta_low, beta_high) and np.any(np.asarray(beta_high) < np.asarray(beta_low)):
            raise ValueError(
                f"beta_high: expected at least beta_low = {np.asarray(beta_low)}, found {np.asarray(beta_high)}"
            )
    return optimal_threshold(utility, log_base=log_base, gain=at_least_float32(bound) / beta_high)


class BudgetReward(NamedTuple):
    """The best reward within a bound and a budget of KL."""

    reward: Samples
    """[...,n], in [0, bound]."""
    multiplier: Numbers
    """[...], mu = dU/dkl in units of u per nat; 0 where the budget does not bind."""


def budget_reward(
    utility: ArrayLike, *, log_base: ArrayLike | None = None, bound: ArrayLike, beta: ArrayLike, kl: ArrayLike
) -> BudgetReward:
    """Gives the reward in [0, bound] whose follower has the highest utility with KL(pi_r‖base) <= kl.

    It is r = clip(beta·(u − c)/mu, 0, bound): the raw reward where only the budget binds, the threshold reward where
    only the bound does. c maximises E[u] − mu·KL, mu solves KL = kl. Its derivatives, in both modes up to the third,
    are those of the implicit function of both.

    Args:
      utility: [...,n].
      log_base: [...,n], log weights; None: n samples of equal weight.
      bound: B > 0, scalar or [...].
      beta: the follower's KL weight > 0, scalar or [...].
      kl: the budget > 0, scalar or [...], in nats.

    Returns:
      A BudgetReward. Where the threshold reward keeps within the budget, it is that reward and mu 0. Where the bound
      does not bind, the least reward is 0. NaN under jit for a budget <= 0.

    Raises:
      ValueError: on concrete values, bound, beta or kl <= 0, and those of `optimal_threshold`.
    """
    for name, value in (("bound", bound), ("beta", beta), ("kl", kl)):
        check_positive(name, value)
    utility, bound, beta, kl = map(at_least_float32, (utility, bound, beta, kl))
    log_base = jnp.zeros_like(utility) if log_base is None else at_least_float32(log_base)
    free = optimal_threshold(utility, log_base=log_base, gain=bound / beta)
    batch = jnp.broadcast_shapes(free.shape, kl.shape)
    dtype = jnp.result_type(utility, log_base, free, kl)
    utility, log_base = (
        jnp.broadcast_to(x, (*batch, max(utility.shape[-1], log_base.shape[-1]))) for x in (utility, log_base)
    )
    bound, beta, kl, free = (jnp.broadcast_to(x, batch).astype(dtype) for x in (bound, beta, kl, free))
    share, multiplier = _budget(utility.astype(dtype), log_base.astype(dtype), bound / beta, kl)
    unbound = threshold_reward(utility, threshold=free, bound=bound)
    reward = jnp.where(column(multiplier > 0), column(bound) * share, unbound)
    return BudgetReward(jnp.where(column(kl > 0), reward, jnp.nan), jnp.where(kl > 0, multiplier, jnp.nan))


@jax.jit  # op by op, each call would compile the loops anew
def _budget(utility: Array, log_base: Array, gain: Array, kl: Array) -> tuple[Array, Array]:
    """(reward/bound [...,n], mu [...]; both 0 where the threshold reward keeps within the budget)."""
    log_weight, present = normalised_weights(log_base)
    log_weight = jnp.where(present, log_weight, NEGATIVE)
    # Shift and unit of u are constants of the problem.
    constant = jax.lax.stop_gradient(utility)
    top = jnp.where(present, constant, -jnp.inf).max(axis=-1, keepdims=True)
    spread = top - jnp.where(present, constant, jnp.inf).min(axis=-1, keepdims=True)
    spread = jnp.where(spread > 0, spread, 1)
    value = jnp.where(present, (utility - top) / spread, 0)
    least = jnp.where(present, value, jnp.inf).min(axis=-1)

    def paid(value: Array, gain: Array, c: Array, log_mu: Array) -> Array:
        """r/beta [...,n] in [0, gain]."""
        return jnp.clip((value - c[..., None]) / jnp.exp(log_mu)[..., None], 0, gain[..., None])

    def kl_of(log_weight: Array, reward: Array) -> Array:
        return gibbs.kl(gibbs.log_policy(log_weight, reward, beta=1.0), log_weight)

    def slope_in_c(log_weight: Array, value: Array, gain: Array, c: Array, log_mu: Array) -> Array:
        """E_pi[u − c − mu·r/beta], which falls in c and is 0 at the best one."""
        reward = paid(value, gain, c, log_mu)
        policy = gibbs.log_policy(log_weight, reward, beta=1.0)
        return gibbs.utility(policy, value - c[..., None] - jnp.exp(log_mu)[..., None] * reward)

    fixed = jax.lax.stop_gradient((log_weight, value, gain, kl, least))

    def best_c(log_mu: Array) -> Array:
        log_weight, value, gain, _, least = fixed

        def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = (low + high) / 2
            more = slope_in_c(log_weight, value, gain, middle, log_mu) > 0
            return jnp.where(more, middle, low), jnp.where(more, high, middle)

        low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (least, jnp.zeros_like(least)))
        return jnp.where(clipped(log_mu), (low + high) / 2, least)

    def clipped(log_mu: Array) -> Array:
        """Whether the raw reward of the range of u, 1, is beyond the bound."""
        return jnp.exp(-log_mu) > fixed[2]

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        log_weight, value, gain, kl = fixed[:4]
        low, high = bracket
        middle = (low + high) / 2
        above = kl_of(log_weight, paid(value, gain, best_c(middle), middle)) > kl
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    lowest, highest = jnp.full_like(least, -14.0), jnp.full_like(least, 16.0)
    lowest, highest = jax.lax.stop_gradient((lowest, highest))
    binds = kl_of(fixed[0], paid(fixed[1], fixed[2], best_c(lowest), lowest)) > fixed[3]
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (lowest, highest))
    log_mu = (low + high) / 2
    is_clipped = clipped(log_mu)

    def newton(root: Array) -> Array:
        """−F'(x)⁻¹·F(x) of x = (c, log mu)."""

        def equations(root: Array) -> Array:
            c, log_mu = root[..., 0], root[..., 1]
            first = jnp.where(is_clipped, slope_in_c(log_weight, value, gain, c, log_mu), least - c)
            return jnp.stack([first, kl_of(log_weight, paid(value, gain, c, log_mu)) - kl], axis=-1)

        unit = jnp.zeros_like(root)
        found, in_c = jax.jvp(equations, (root,), (unit.at[..., 0].set(1),))
        in_mu = jax.jvp(equations, (root,), (unit.at[..., 1].set(1),))[1]
        det = in_c[..., 0] * in_mu[..., 1] - in_mu[..., 0] * in_c[..., 1]
        det = jnp.where(det != 0, det, jnp.inf)
        c = (in_mu[..., 1] * found[..., 0] - in_mu[..., 0] * found[..., 1]) / det
        mu = (in_c[..., 0] * found[..., 1] - in_c[..., 1] * found[..., 0]) / det
        return -jnp.stack([c, mu], axis=-1)

    # Where the budget does not bind there is no root; nothing is read of what stands in its place.
    start = jnp.where(binds[..., None], jnp.stack([best_c(log_mu), log_mu], axis=-1), jnp.array([-0.5, 0.0], kl.dtype))
    root = with_root_derivatives(start, newton)
    share = paid(value, gain, root[..., 0], root[..., 1]) / jnp.where(gain > 0, gain, 1)[..., None]
    mu = spread[..., 0] * jnp.exp(root[..., 1])
    return jnp.where(binds[..., None], share, 0), jnp.where(binds, mu, 0)

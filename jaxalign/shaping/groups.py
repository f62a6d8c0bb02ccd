"""What the leader pays for the worst-off of several groups of users: a linear program, solved and differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32
from jaxalign._checks import check_positive, is_concrete
from jaxalign.shapes import Numbers, Samples
from jaxalign.shaping.threshold import normalised_weights
from jaxalign.types import Array, ArrayLike

_STEPS = 60
_HIGHEST = 30.0


class WorstGroup(NamedTuple):
    """The best reward for the group that is worst off."""

    log_weight: Samples
    """[...,n], r/beta in [0, gain]."""
    utility: Numbers
    """[...], the utility of the worst-off group under it, min over groups of E_pi[u_g]."""
    multipliers: Array
    """[G,...], >= 0 and of sum 1: the reward is the threshold reward of Σ_g multiplier_g·u_g, up to what is paid within
    the bound at the threshold itself."""


def worst_group(utility: ArrayLike, *, log_base: ArrayLike | None = None, gain: ArrayLike) -> WorstGroup:
    """Gives the reward in [0, bound] that is best for the worst-off group, max over r of min over g of E_{pi_r}[u_g].

    In the follower's weights it is a linear program (Charnes–Cooper): s <= w_i <= s·e^gain, Σ p_i·w_i = 1,
    Σ p_i·w_i·u_gi >= t, maximise t; r/beta = log(w/s). An interior-point method finds which responses are paid nothing,
    all, or (at most G − 1 of them) something between. The linear system of these gives the numbers, exactly and with
    derivatives of every order in both modes, while the sets stay. O(n³) a prompt: for enumerations and samples.

    Args:
      utility: [G,...,n], of each group, of one prompt's responses or samples.
      log_base: [...,n], log weights, the same for all groups; None: n samples of equal weight.
      gain: bound/beta, in (0, 30], scalar or [...].

    Returns:
      A WorstGroup. Where several rewards tie (constant utilities, groups that agree) it is one in their middle, and the
      derivative is that of the envelope with the multipliers held, as it is in float32 where digits do not tell the
      sets: right to first order, if there is a derivative. NaN under jit for utilities that are not finite.

    Raises:
      ValueError: no group, on concrete values a gain that is not in (0, 30], utilities that are not finite.
    """
    check_positive("gain", gain)
    utility, gain = at_least_float32(utility), at_least_float32(gain)
    if utility.ndim < 2 or 0 in (utility.shape[0], utility.shape[-1]):
        raise ValueError(f"utility: expected [G,...,n], a group and a response at least, found shape {utility.shape}")
    if is_concrete(gain) and np.any(np.asarray(gain) > _HIGHEST):
        raise ValueError(f"gain: expected at most {_HIGHEST:g}, found {np.asarray(gain)}")
    if is_concrete(utility) and not np.isfinite(np.asarray(utility)).all():
        raise ValueError("utility: expected finite numbers, found NaN or infinity")
    log_base = jnp.zeros(utility.shape[1:]) if log_base is None else at_least_float32(log_base)
    dtype = jnp.result_type(utility, log_base, gain)
    groups, n = utility.shape[0], utility.shape[-1]
    batch = jnp.broadcast_shapes(utility.shape[1:-1], log_base.shape[:-1], gain.shape)
    utility = jnp.moveaxis(jnp.broadcast_to(utility, (groups, *batch, n)), 0, -2).reshape(-1, groups, n)
    log_base = jnp.broadcast_to(log_base, (*batch, n)).reshape(-1, n)
    flat = jnp.broadcast_to(gain, batch).reshape(-1)
    paid, value, share = _worst_groups(utility.astype(dtype), log_base.astype(dtype), flat.astype(dtype))
    shares = jnp.moveaxis(share.reshape(*batch, groups), -1, 0)
    return WorstGroup(paid.reshape(*batch, n), value.reshape(batch), shares)


@jax.jit
@jax.vmap
def _worst_groups(utility: Array, log_base: Array, gain: Array) -> tuple[Array, Array, Array]:
    """(r/beta [n], t [], multipliers [G]) of one prompt: utility [G,n]."""
    log_weight, present = normalised_weights(log_base)
    prob = jnp.where(present, jnp.exp(jnp.where(present, log_weight, 0)), 0)
    constant = jax.lax.stop_gradient(jnp.where(present, utility, 0))
    offset = (constant.max() + constant.min()) / 2
    spread = jnp.where(constant.max() > constant.min(), constant.max() - constant.min(), 1)
    scaled = jnp.where(present, (utility - offset) / spread, 0)
    solved = _interior_point(*jax.lax.stop_gradient((scaled, prob, gain)))
    paid, value, share = _basis(scaled, prob, gain, present, solved)
    return jnp.where(present, paid, 0), offset + spread * value, share


class _Solved(NamedTuple):
    """An interior solution of the linear program."""

    weight: Array  # [n], w
    smallest: Array  # [], s
    value: Array  # [], t
    slack: Array  # [2n+G], of w >= s, w <= s·e^gain, E[u_g] >= t
    dual: Array  # [2n+G]


def _interior_point(utility: Array, prob: Array, gain: Array) -> _Solved:
    """Mehrotra's predictor–corrector on z = (w, s, t): minimise −t, A·z = 1, G·z + slack = 0."""
    groups, n = utility.shape
    dtype, eye = utility.dtype, jnp.eye(n, dtype=utility.dtype)
    column, none = jnp.ones((n, 1), dtype), jnp.zeros((n, 1), dtype)
    rows = jnp.concatenate(
        [
            jnp.concatenate([-eye, column, none], axis=1),
            jnp.concatenate([eye, -jnp.exp(gain) * column, none], axis=1),
            jnp.concatenate([-prob * utility, jnp.zeros((groups, 1), dtype), jnp.ones((groups, 1), dtype)], axis=1),
        ]
    )
    equal = jnp.concatenate([prob, jnp.zeros(2, dtype)])
    cost = jnp.zeros(n + 2, dtype).at[-1].set(-1)
    first = jnp.concatenate([jnp.ones(n, dtype), jnp.exp(-gain / 2)[None], (utility @ prob).min()[None] - 1])
    goal = 1e-5 if dtype == jnp.float32 else 1e-14

    def direction(carry: tuple[Array, ...], centring: Array, extra: Array, solve: Callable[[Array], Array]) -> Any:
        z, nu, slack, dual = carry[:4]
        lack = rows @ z + slack
        complement = slack * dual + extra - centring
        stationary = cost + rows.T @ dual + nu * equal
        right = -stationary - rows.T @ ((dual * lack - complement) / slack)
        found = solve(jnp.concatenate([right, 1 - equal @ z[None].T]))
        dz, dnu = found[:-1], found[-1]
        dslack = -lack - rows @ dz
        return dz, dnu, dslack, -(complement + dual * dslack) / slack

    def longest(x: Array, dx: Array) -> Array:
        return jnp.minimum(1, jnp.where(dx < 0, -x / jnp.where(dx < 0, dx, -1), jnp.inf).min())

    def step(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        z, nu, slack, dual, taken, _ = carry
        matrix = (rows.T * (dual / slack)) @ rows
        matrix = jnp.block([[matrix, equal[:, None]], [equal[None], jnp.zeros((1, 1), dtype)]])
        factors = jax.scipy.linalg.lu_factor(matrix)
        solve = lambda b: jax.scipy.linalg.lu_solve(factors, b)  # noqa: E731
        mean = (slack * dual).mean()
        _, _, dslack, ddual = direction(carry, jnp.zeros((), dtype), jnp.zeros_like(slack), solve)
        ahead = ((slack + longest(slack, dslack) * dslack) * (dual + longest(dual, ddual) * ddual)).mean()
        dz, dnu, ds, dl = direction(carry, mean * (ahead / mean) ** 3, dslack * ddual, solve)
        along, across = 0.99 * longest(slack, ds), 0.99 * longest(dual, dl)
        moved = (z + along * dz, nu + across * dnu, slack + along * ds, dual + across * dl)
        fine = jnp.all(jnp.array([jnp.isfinite(x).all() for x in moved]))
        kept = tuple(jnp.where(fine, new, old) for new, old in zip(moved, carry[:4], strict=True))
        return (*kept, taken + 1, fine)

    def going(carry: tuple[Array, ...]) -> Array:
        return (carry[4] < _STEPS) & carry[5] & ((carry[2] * carry[3]).mean() * carry[2].size > goal)

    dual = jnp.full(2 * n + groups, 1 / (2 * n + groups), dtype)
    slack = jnp.maximum(-rows @ first, 1e-3)
    start = (first, jnp.zeros((), dtype), slack, dual, jnp.zeros((), jnp.int32), jnp.ones((), bool))
    z, _, slack, dual, _, _ = jax.lax.while_loop(going, step, start)  # type: ignore[arg-type]
    return _Solved(z[:-2], z[-2], z[-1], slack, dual)


def _basis(utility: Array, prob: Array, gain: Array, present: Array, solved: _Solved) -> tuple[Array, Array, Array]:
    """The numbers of the sets that the interior point shows, from linear systems of at most 2G + 1 unknowns; those of
    the interior point itself where the two contradict each other, as at ties."""
    groups, n = utility.shape
    low_slack, high_slack = solved.slack[:n], solved.slack[n : 2 * n]
    low_dual, high_dual, share = solved.dual[:n], solved.dual[n : 2 * n], solved.dual[2 * n :]
    # Strictly complementary: one of slack and dual is of the order of the gap's root and more, the other far below.
    between = jnp.minimum(low_slack / low_dual, high_slack / high_dual)
    inside = present & (between > 1)
    slots = min(groups - 1, n)
    _, slot = jax.lax.top_k(jnp.where(inside, between, 0), slots)
    used = inside[slot]
    log_ratio = jnp.clip(jnp.log(solved.weight / solved.smallest), 0, gain)
    upper = high_slack / high_dual < low_slack / low_dual
    paid = jnp.where(inside, log_ratio, jnp.where(upper, gain, 0))
    plain = paid - jnp.where(present, jax.lax.stop_gradient(paid), jnp.inf).min()
    weights = jnp.where(present, prob * jnp.exp(plain), 0)
    envelope = share @ (utility @ weights) / weights.sum()
    held = (prob * jnp.exp(paid)).at[slot].set(jnp.where(used, 0, (prob * jnp.exp(paid))[slot]))
    # Unknown: the weights of the slots that are used, s, t, and what each group has above t.
    active = _first(share, used.sum() + 1)
    chosen = jnp.where(used, prob[slot], 0)
    size = slots + 2 + groups
    at = jnp.arange(groups)
    matrix = jnp.zeros((size, size), utility.dtype)
    matrix = matrix.at[0, :slots].set(chosen).at[0, slots].set(held.sum())
    matrix = matrix.at[1 : 1 + groups, :slots].set(utility[:, slot] * chosen)
    matrix = matrix.at[1 : 1 + groups, slots].set(utility @ held).at[1 : 1 + groups, slots + 1].set(-1)
    matrix = matrix.at[1 + at, slots + 2 + at].set(-1)
    flags = jnp.concatenate([active, ~used])
    units = jnp.concatenate([slots + 2 + at, jnp.arange(slots)])
    zero = units[jnp.argsort(~flags, stable=True)[: slots + 1]]
    matrix = matrix.at[1 + groups + jnp.arange(slots + 1), zero].set(1)
    whole = jnp.zeros(size, utility.dtype).at[0].set(1)
    lines_kept = jnp.argsort(~jnp.concatenate([jnp.ones(1, bool), used, ~active]), stable=True)[:groups]

    def numbers(matrix: Array, utility: Array, right: Array) -> tuple[Array, Array, Array, Array]:
        """(w/s of the slots, t, what each group has above it, the multipliers) where the sets are right, else numbers
        that have derivatives."""
        found = jnp.linalg.solve(jnp.where(right, matrix, jnp.eye(size, dtype=matrix.dtype)), whole)
        smallest, value = jnp.where(right, found[slots], 1), found[slots + 1]
        # The threshold of the mixture by the multipliers is t, at which the slots lie.
        lines = [jnp.ones((1, groups)), (utility[:, slot] - value).T, jnp.eye(groups)]
        system = jnp.concatenate([line.astype(utility.dtype) for line in lines])[lines_kept]
        system = jnp.where(right, system, jnp.eye(groups, dtype=system.dtype))
        shares = jnp.linalg.solve(system, jnp.zeros(groups, utility.dtype).at[0].set(1))
        return found[:slots] / smallest, value, found[slots + 2 :], shares

    ratio, value, above, shares = numbers(*jax.lax.stop_gradient((matrix, utility)), jnp.ones((), bool))
    slack = 1e-3 if utility.dtype == jnp.float32 else 1e-6
    ratio = jnp.where(used, ratio, 1)
    right = (jnp.abs(value - solved.value) < slack) & (above >= -slack).all() & (shares >= -slack).all()
    right &= ((ratio >= 1 - slack) & (ratio <= jnp.exp(gain) * (1 + slack))).all()
    ratio, value, _, shares = numbers(matrix, utility, right)
    held_ratio = jnp.where(used & right & (ratio > 0), ratio, 1)
    paid = paid.at[slot].set(jnp.where(used, jnp.log(held_ratio), paid[slot]))
    return jnp.where(right, paid, plain), jnp.where(right, value, envelope), jnp.where(right, shares, share)


def _first(values: Array, count: Array) -> Array:
    """bool of values' shape: the `count` largest."""
    order = jnp.argsort(-values, stable=True)
    return jnp.zeros(values.shape, bool).at[order].set(jnp.arange(values.shape[0]) < count)

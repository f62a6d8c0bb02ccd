"""The optimal transformation for a procedure: InfAlign's coupled equations, solved (arXiv 2412.19792).

Any optimum of max_pi W^P(pi > base) − beta·KL(pi‖base) satisfies

    (a) pi(y) = base(y)·exp(R(y)/beta)/Z        (b) R(y) = dW^P/dpi(y) at pi, up to a constant in y

so some reward R makes RLHF return it. Where pi -> W^P is concave (no procedure, best-of-N) the solution is the unique
optimum; for worst-of-N, where it is convex, the equations are only necessary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxalign import gibbs
from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported
from jaxalign._checks import check_positive
from jaxalign.infalign import curves
from jaxalign.infalign.levels import procedure_win_rate
from jaxalign.infalign.procedures import Procedure, best_of, worst_of
from jaxalign.shapes import Numbers, Outcomes
from jaxalign.types import Array, ArrayLike


class WinRate(Protocol):
    """W^P [] of a policy against its base from the policy's probabilities [M], in which it is differentiable; the
    further arguments are those that `solve` is given."""

    def __call__(self, prob: Array, /, *arguments: Any, **keywords: Any) -> Array: ...


class FixedPoint(NamedTuple):
    """A solution of (a) and (b)."""

    reward: Outcomes
    """[...,M], R, with its largest value 0."""
    log_policy: Outcomes
    """[...,M], log pi."""
    objective: Numbers
    """[...], W^P − beta·KL."""
    residual: Numbers
    """[...], the largest |log pi − log(base·exp(R/beta)/Z)| in nats."""
    steps: Array
    """[...], steps taken."""


def solve(
    win_rate: WinRate,
    log_base: ArrayLike,
    *arguments: ArrayLike,
    beta: ArrayLike,
    start: ArrayLike | None = None,
    steps: int = 4000,
    tolerance: float | None = None,
) -> FixedPoint:
    """Gives the fixed point of (a) and (b) over M outcomes, of any procedure.

    It starts at the base, or at `start`. First KL-proximal ascent, log pi <- (1 − η)·log pi + η·(log base + R/beta) −
    log Z, η halved until the objective does not fall: safe from anywhere. Where the objective is flat to rounding the
    same step goes on by the residual, η halved whenever it grows: undamped it would diverge for best-of-N and small
    beta.

    Differentiable in beta, log_base and the arguments, in both modes and to any order, through the implicit function
    (an M x M linear solve). What win_rate depends on besides must be an argument: jax refuses a derivative in what it
    closes over. Inside a lax.scan, where jax drops the rule, reverse over reverse raises. Residual and steps have
    derivative 0, and derivatives are NaN where the residual is above 100 times the tolerance.

    Args:
      win_rate: a WinRate, whose gradient is R: of ranks `procedure_win_rate`, of any rule `rule_win_rate`. A function
        that is built once is one trace.
      log_base: [M], log-probabilities of the base; normalised inside.
      arguments: handed on to win_rate after the probabilities.
      beta: the KL weight > 0, any shape [...], in units of win rate per nat.
      start: [M], log-probabilities to start from on the base's support; None for the base.
      steps: at most so many.
      tolerance: of the residual, in nats; None for 1e-10 in float64, 1e-4 in float32.

    Returns:
      A FixedPoint of beta's shape. Its residual says whether it converged.

    Raises:
      ValueError: on concrete values beta <= 0; a win_rate that does not give one real number.
    """
    check_positive("beta", beta)
    log_base, beta = at_least_float32(log_base), at_least_float32(beta)
    dtype = jnp.result_type(log_base, beta)
    log_base = jnp.where(is_supported(log_base), jax.nn.log_softmax(log_base.astype(dtype)), NEGATIVE)
    won = jax.eval_shape(win_rate, log_base, *arguments)
    if getattr(won, "shape", None) != () or not jnp.issubdtype(won.dtype, jnp.floating):
        name = getattr(win_rate, "__qualname__", repr(win_rate))
        found = f"shape {won.shape} of {won.dtype}" if hasattr(won, "shape") else type(won).__name__
        raise ValueError(f"win_rate {name}: expected one real number, found {found}")
    limit = _tolerance(dtype) if tolerance is None else tolerance
    first = log_base if start is None else jnp.where(is_supported(log_base), jax.nn.log_softmax(start), NEGATIVE)

    def one(beta: Array) -> FixedPoint:
        log_policy, residual, taken = _solve(win_rate, limit, steps, log_base, first, beta, *arguments)
        objective, reward, _ = _look(win_rate, log_policy, log_base, beta, *arguments)
        top = jnp.where(is_supported(log_base), reward, -jnp.inf).max()
        return FixedPoint(reward - top, log_policy, objective, residual, taken.astype(jnp.int32))

    solve: Callable[[Array], FixedPoint] = one
    for _ in range(beta.ndim):
        solve = jax.vmap(solve)
    result = solve(beta.astype(dtype))
    return result


def _tolerance(dtype: jnp.dtype) -> float:
    return 1e-10 if dtype == jnp.float64 else 1e-4


def _look(
    win_rate: WinRate, log_policy: Array, log_base: Array, beta: Array, *arguments: ArrayLike
) -> tuple[Array, Array, Array]:
    """(objective, R, log of the tilted base) at a policy."""
    won, reward = jax.value_and_grad(win_rate)(jnp.exp(log_policy), *arguments)
    objective = won - beta * gibbs.kl(log_policy, log_base)
    return objective, reward, gibbs.log_policy(log_base, reward, beta=beta)


class _State(NamedTuple):
    log_policy: Array
    reward: Array  # R at log_policy
    target: Array  # log(base·exp(R/beta)/Z)
    objective: Array
    near: Array  # distance of the two
    eta: Array
    flat: Array  # whether the objective can no longer tell
    taken: Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    win_rate: WinRate, limit: float, steps: int, log_base: Array, first: Array, beta: Array, *arguments: ArrayLike
) -> tuple[Array, Array, Array]:
    """(log pi [M], the residual, steps taken as a float)."""
    eps = float(jnp.finfo(log_base.dtype).eps)
    inside = is_supported(log_base)

    def look(log_policy: Array) -> tuple[Array, Array, Array]:
        return _look(win_rate, log_policy, log_base, beta, *arguments)

    def gap(log_policy: Array, target: Array) -> Array:
        return jnp.where(inside, log_policy - target, 0)

    def distance(log_policy: Array, target: Array) -> Array:
        # The mean square under the policy: at the fixed point a damped step contracts in it.
        return jnp.sqrt((jnp.exp(log_policy) * gap(log_policy, target) ** 2).sum())

    def step(state: _State) -> _State:
        mixed = state.log_policy - state.eta * gap(state.log_policy, state.target)
        policy = jnp.where(inside, mixed - jax.nn.logsumexp(mixed), NEGATIVE)
        objective, reward, target = look(policy)
        near = distance(policy, target)
        accept = jnp.where(state.flat, near < state.near, objective >= state.objective)
        # A change this small is rounding: from there on the distance decides.
        flat = state.flat | (jnp.abs(objective - state.objective) < 32 * eps)
        # Where errors fall by less than a step of this size makes the slowest of them fall, it overshoots the others.
        good = accept & (~state.flat | (near < (1 - state.eta / 2) * state.near))
        eta = jnp.where(good, jnp.minimum(1.1 * state.eta, 1), state.eta / 2)
        moved = state._replace(log_policy=policy, reward=reward, target=target, objective=objective, near=near)
        kept: _State = jax.tree.map(lambda new, old: jnp.where(accept, new, old), moved, state)
        return kept._replace(eta=eta, flat=flat, taken=state.taken + 1)

    def going(state: _State) -> Array:
        far = jnp.abs(gap(state.log_policy, state.target)).max() > limit
        return far & (state.taken < steps) & (state.eta > eps)

    objective, reward, target = look(first)
    near, eta = distance(first, target), jnp.ones_like(beta)
    start = _State(first, reward, target, objective, near, eta, jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    found = jax.lax.while_loop(going, step, start)
    residual = jnp.abs(gap(found.log_policy, found.target)).max()
    return found.log_policy, residual, found.taken.astype(residual.dtype)


@_solve.defjvp
def _solve_jvp(
    win_rate: WinRate, limit: float, steps: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """x = log pi solves x = T(x, θ), so (I − dT/dx)·dx = dT/dθ·dθ. The x is that of the function itself, so that it
    carries its own derivative into those of this rule: all orders are right. The start has no part in it."""
    log_base, _, beta, *arguments = primals
    found = _solve(win_rate, limit, steps, *primals)
    # Ranks and other whole numbers have no tangents.
    real = tuple(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in arguments)
    moved = tuple(tangent for tangent, keep in zip(tangents[3:], real, strict=True) if keep)
    change = _change(win_rate, real, found[0], log_base, beta, tuple(arguments), (tangents[0], tangents[2], moved))
    far = found[1] > 100 * max(limit, _tolerance(log_base.dtype))
    change = jnp.where(far, jnp.nan, change)
    return found, (change, jnp.zeros_like(found[1]), jnp.zeros_like(found[2]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _change(
    win_rate: WinRate,
    real: tuple[bool, ...],
    log_policy: Array,
    log_base: Array,
    beta: Array,
    arguments: tuple[ArrayLike, ...],
    tangents: tuple[Array, Array, tuple[Array, ...]],
) -> Array:
    """dx [M] of dlog_base, dbeta and those of the arguments that are real."""

    def tilted(log_policy: Array, log_base: Array, beta: Array, numbers: tuple[Array, ...]) -> Array:
        left = list(numbers)
        given = [left.pop(0) if keep else x for x, keep in zip(arguments, real, strict=True)]
        return _look(win_rate, log_policy, log_base, beta, *given)[2]

    numbers = tuple(jnp.asarray(x) for x, keep in zip(arguments, real, strict=True) if keep)
    _, driven = jax.jvp(lambda *theta: tilted(log_policy, *theta), (log_base, beta, numbers), tangents)
    slope = jax.jacfwd(tilted)(log_policy, log_base, beta, numbers)
    # Outside the support nothing moves.
    driven = jnp.where(is_supported(log_base), driven, 0)
    change: Array = jnp.linalg.solve(jnp.eye(slope.shape[0], dtype=slope.dtype) - slope, driven)
    return change


def optimal_transform(procedure: Procedure, *, beta: ArrayLike, steps: int = 4000) -> FixedPoint:
    """Gives the optimal transform of a calibrated reward without ties, Phi*(v) = −∫_v^1 g(c)·g(F(c)) dc.

    F is the quantile law of the policy that it tilts to; Phi* is the same for every base, reward and prompt.
    `tabulated(grid().c, found.reward)` makes a transform of it.

    Args:
      procedure: what runs on top.
      beta: the KL weight > 0, any shape [...], in units of win rate per nat.
      steps: at most so many, of `solve`.

    Returns:
      A FixedPoint [...,M] at the points of `grid()`.

    Raises:
      ValueError: on concrete values, beta <= 0.
    """
    beta = at_least_float32(beta)
    return solve(_on_grid(procedure), curves.grid(beta.dtype).log_base, beta=beta, steps=steps)


@functools.cache
def _on_grid(procedure: Procedure) -> WinRate:
    return lambda prob: curves.curve_win_rate(prob, procedure)


def bon_fp(n: int, *, beta: ArrayLike) -> FixedPoint:
    """Gives the optimal transform for best-of-N, Phi*(v) = −N²·∫_v^1 (c·F)^(N−1) dc.

    It is v − 1 at N = 1 and tends to N²/(2N−1)·c^(2N−1), up to a constant, as beta -> inf.

    Args:
      n: N >= 1.
      beta: the KL weight > 0, any shape [...], in units of win rate per nat.

    Returns:
      A FixedPoint [...,M] at the points of `grid()`.

    Raises:
      ValueError: n below 1; on concrete values, beta <= 0.
    """
    return optimal_transform(best_of(n), beta=beta)


def won_fp(n: int, *, beta: ArrayLike) -> FixedPoint:
    """Gives the optimal transform for worst-of-N, Phi*(v) = −N²·∫_v^1 ((1 − c)·(1 − F))^(N−1) dc.

    It is v − 1 at N = 1 and tends to −N²/(2N−1)·(1 − c)^(2N−1) as beta -> inf.

    Args:
      n: N >= 1.
      beta: the KL weight > 0, any shape [...], in units of win rate per nat.

    Returns:
      A FixedPoint [...,M] at the points of `grid()`.

    Raises:
      ValueError: n below 1; on concrete values, beta <= 0.
    """
    return optimal_transform(worst_of(n), beta=beta)


def optimal_reward(
    log_base: ArrayLike,
    *,
    rank: ArrayLike,
    procedure: Procedure,
    beta: ArrayLike,
    selection_rank: ArrayLike | None = None,
    steps: int = 4000,
) -> FixedPoint:
    """Gives the optimal reward over M outcomes with ties; vmap-able over prompts.

    Args:
      log_base: [M], log-probabilities of the base, in nats.
      rank: [M], of each outcome by reward (`ranks`).
      procedure: what runs on top.
      beta: the KL weight > 0, any shape [...], in units of win rate per nat.
      selection_rank: [M], the ranks by which the procedure picks, where it is not by the reward itself.
      steps: at most so many, of `solve`.

    Returns:
      A FixedPoint [...,M].

    Raises:
      ValueError: ranks that are no whole numbers; on concrete values, beta <= 0.
    """
    log_base = at_least_float32(log_base)
    others = () if selection_rank is None else (selection_rank,)
    return solve(_on_levels(procedure), log_base, jax.nn.softmax(log_base), rank, *others, beta=beta, steps=steps)


@functools.cache
def _on_levels(procedure: Procedure) -> WinRate:
    return lambda prob, base, rank, selection_rank=None: procedure_win_rate(
        prob, base=base, rank=rank, procedure=procedure, selection_rank=selection_rank
    )

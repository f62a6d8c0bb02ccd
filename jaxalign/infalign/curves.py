"""Win rates and KL of tilted policies for rewards without ties: integrals over the quantile c, which is uniform on
[0, 1] under the base, so that they hold for every base, reward and prompt (InfAlign, arXiv 2412.19792).

The integrals are sums over a fixed grid: Gauss points in cells that shrink towards both ends, where small beta puts its
spikes. The grid is a finite base of M outcomes with log weights `grid().log_base`, so the closed forms of `gibbs` hold
on it. Exact to about 1e-9 in float64 and 1e-5 in float32 up to a KL of 12.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import gibbs
from jaxalign._arrays import at_least_float32, with_root_derivatives
from jaxalign._checks import check_positive, is_concrete
from jaxalign.infalign.procedures import Procedure, best_of, none, worst_of
from jaxalign.infalign.table_gaps import match_table_kl
from jaxalign.infalign.transforms import Transform, transformed
from jaxalign.shapes import Numbers, Outcomes, PerResponse
from jaxalign.types import Array, ArrayLike

_CELLS, _POINTS = 160, 6  # cells, even in the logit of c over ±_REACH, and Gauss points in each
_REACH = 24.0


class Grid(NamedTuple):
    """Points of the integrals over quantiles."""

    c: PerResponse
    """[M], quantiles in (0, 1), increasing."""
    log_base: PerResponse
    """[M], log of their weights, which add to 1."""


class Curve(NamedTuple):
    """A tilted policy against its base."""

    kl: Numbers
    """[...], in nats."""
    win_rate: Numbers
    """[...], without a procedure."""
    best_of_n: Numbers
    """[...], the win rate when best-of-n runs on both sides."""
    worst_of_n: Numbers
    """[...], the win rate when worst-of-n runs on both sides."""


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(c [M], weight [M], integral [points,points]): the integral up to point j of a cell of width 1 is row j times the
    values at its points."""
    x, w = np.polynomial.legendre.leggauss(_POINTS)
    x, w = (x + 1) / 2, w / 2
    power = np.arange(_POINTS)
    integral = x[:, None] ** (power + 1) / (power + 1) @ np.linalg.inv(x[:, None] ** power)
    # The lower half, mirrored: 1 − c would lose its digits in the upper one.
    logit = np.linspace(-_REACH, 0, _CELLS // 2)
    edge = np.concatenate([[0.0], 1 / (1 + np.exp(-logit))])
    width = np.diff(edge)
    c, weight = (edge[:-1, None] + width[:, None] * x).reshape(-1), (width[:, None] * w).reshape(-1)
    return np.concatenate([c, 1 - c[::-1]]), np.concatenate([weight, weight[::-1]]), integral / w


def grid(dtype: jax.typing.DTypeLike | None = None) -> Grid:
    """Gives the points on which integrals over quantiles are summed.

    Args:
      dtype: of both arrays; None for jax's default.

    Returns:
      A Grid of M quantiles and log weights.
    """
    c, weight, _ = _tables()
    dtype = jnp.result_type(float) if dtype is None else dtype
    return Grid(jnp.asarray(c, dtype), jnp.asarray(np.log(weight), dtype))


def distribution(prob: ArrayLike) -> Outcomes:
    """Gives the quantile law of a policy, F(c) = Pr_pi(quantile <= c), at the grid's points.

    Args:
      prob: [...,M], the policy's masses at the grid's points.

    Returns:
      [...,M] in [0, 1].
    """
    prob = at_least_float32(prob)
    cells = prob.reshape(*prob.shape[:-1], -1, _POINTS)
    total = cells.sum(axis=-1)
    before = jnp.cumsum(total, axis=-1) - total
    # Accelerators would multiply float32 with half its digits.
    inside = jnp.matmul(cells, jnp.asarray(_tables()[2].T, prob.dtype), precision="highest")
    upto = (before[..., None] + inside).reshape(prob.shape)
    # Rounding takes F out of [0, 1] by a digit; its derivative is right there too, so the clip must not cut it.
    return upto + jax.lax.stop_gradient(jnp.clip(upto, 0, 1) - upto)


def curve_win_rate(prob: ArrayLike, procedure: Procedure) -> Numbers:
    """Gives how often P(pi) beats P(base), W^P = ∫ G(c)·g(F)·f dc = 1 − ∫ g(c)·G(F) dc.

    Its gradient in the masses is −∫_v^1 g(c)·g(F(c)) dc at each point v, up to a constant.

    Args:
      prob: [...,M], the policy's masses at the grid's points.
      procedure: P, which runs on both sides.

    Returns:
      [...] in [0, 1].
    """
    upto = distribution(prob)
    c, log_base = grid(upto.dtype)
    return 1 - (jnp.exp(log_base) * procedure.density(c) * procedure.cumulative(upto)).sum(axis=-1)


def curve_kl(log_policy: ArrayLike) -> Numbers:
    """Gives KL(pi‖base) = ∫ f·log f dc of a policy on the grid.

    Args:
      log_policy: [...,M], log masses at the grid's points.

    Returns:
      [...], in nats.
    """
    log_policy = at_least_float32(log_policy)
    log_base = grid(log_policy.dtype).log_base
    d = log_policy - log_base
    # ∫ f log f − f + 1: no term is negative, so that a small KL keeps its digits.
    return (jnp.exp(log_base) * (d * jnp.exp(d) - jnp.expm1(d))).sum(axis=-1)


def tilted_curve(transform: Transform, *, beta: ArrayLike, n: int = 4) -> Curve:
    """Gives KL and win rates of the policy pi ∝ base·exp(Phi(C)/beta).

    f(c) = exp(Phi(c)/beta)/∫, F its integral; W = 1 − ∫ F, W_BoN = 1 − N·∫ c^(N−1)·F^N,
    W_WoN = N·∫ (1 − c)^(N−1)·(1 − F)^N. Differentiable in beta and in what Phi depends on, vmap-able in beta. The
    reward must have no atoms: for few outcomes see `levels`.

    Args:
      transform: Phi, called once on the grid's quantiles [M].
      beta: > 0, any shape [...], in units of Phi per nat.
      n: the N of both procedures.

    Returns:
      A Curve of beta's shape.

    Raises:
      ValueError: a transform that changes the shape; on concrete values beta <= 0; n < 1.
    """
    beta = at_least_float32(beta)
    c, log_base = grid(beta.dtype)
    log_policy = gibbs.log_policy(log_base, transformed(transform, c), beta=beta)
    return curve(log_policy, n=n)


def curve(log_policy: ArrayLike, *, n: int = 4) -> Curve:
    """Gives KL and win rates of any policy on the grid.

    Args:
      log_policy: [...,M], log masses at the grid's points.
      n: the N of best-of-N and worst-of-N, >= 1.

    Returns:
      A Curve.

    Raises:
      ValueError: n below 1.
    """
    result: Curve = _curve(at_least_float32(log_policy), best_of(n), worst_of(n))
    return result


@functools.partial(jax.jit, static_argnums=(1, 2))
def _curve(log_policy: Array, best: Procedure, worst: Procedure) -> Curve:
    return Curve(curve_kl(log_policy), *(curve_win_rate(jnp.exp(log_policy), p) for p in (none(), best, worst)))


def match_kl(transform: Transform, *, kl: ArrayLike, samples: int | None = None) -> Numbers:
    """Gives the beta at which the policy tilted by Phi(C) has a given KL to its base.

    Bisected over many decades. Its derivatives, in kl and in what Phi depends on, are those of the implicit function,
    in both modes, up to the third. Steep transforms for worst-of-N need a tiny beta, since they hardly tell the upper
    quantiles apart.

    Args:
      transform: Phi, called once on the grid's quantiles [M].
      kl: > 0, any shape [...], in nats.
      samples: K >= 2: beta for quantiles that are ranks among a table of K base samples, at which the KL is `kl` in the
        mean over tables, by 4,000 fixed draws of the gaps between the samples; a finite table costs nats. None: exact
        quantiles.

    Returns:
      beta [...]; NaN under jit for a KL that no beta of the grid's reach gives (a transform
      that is flat at its top, or a KL above 20).

    Raises:
      ValueError: kl <= 0, a transform that changes the shape, fewer than 2 samples; on concrete values a KL that is not
        reached, with `samples` also a transform that is not finite at 0.
    """
    check_positive("kl", kl)
    kl = at_least_float32(kl)
    if samples is not None:
        return match_table_kl(transform, kl=kl, samples=samples)
    c, _ = grid(kl.dtype)
    value = transformed(transform, c).astype(kl.dtype)
    # A unit for the root: beta is the same, and so are its derivatives, whatever the unit.
    spread = jax.lax.stop_gradient(value.max() - value.min())
    log_t = _log_inverse(value / jnp.where(spread > 0, spread, 1), kl)
    if is_concrete(log_t) and np.isnan(np.asarray(log_t)).any():
        raise ValueError(f"kl: expected a KL that the transform reaches in {kl.dtype}, found {np.asarray(kl)}")
    return spread * jnp.exp(-log_t)


def _tilted_at(value: Array, log_t: Array) -> tuple[Array, Array]:
    """(log policy [...,M], theta [...,M] = (value − its largest)·t) at log t [...]."""
    theta = (value - jax.lax.stop_gradient(value.max())) * jnp.exp(log_t)[..., None]
    return jax.nn.log_softmax(grid(value.dtype).log_base + theta, axis=-1), theta


@jax.jit  # op by op, each call would compile the loop anew
def _log_inverse(value: Array, kl: Array) -> Array:
    """log(1/beta) [...] of values [M] of range 1 and kl [...]; NaN where no root is within reach."""
    root = _bisected(*jax.lax.stop_gradient((value, kl)))
    reached = jnp.isfinite(root)

    def step(log_t: Array) -> Array:
        """dKL/dlog t = Var_pi(theta)."""
        log_policy, theta = _tilted_at(value, log_t)
        policy = jnp.exp(log_policy)
        # Quantiles without mass are at −1e30, whose square is no number in float32.
        theta = jnp.where(policy > 0, theta, 0)
        slope = (policy * (theta - (policy * theta).sum(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
        return (kl - curve_kl(log_policy)) / jnp.where(slope > 0, slope, 1)

    return jnp.where(reached, with_root_derivatives(jnp.where(reached, root, 0), step), jnp.nan)


def _bisected(value: Array, kl: Array) -> Array:
    highest = 250.0 if kl.dtype == jnp.float64 else 30.0  # decades

    def kl_at(log_t: Array) -> Array:
        return curve_kl(_tilted_at(value, log_t)[0])

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        below = kl_at(middle) < kl
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low = jnp.full(kl.shape, -7 * np.log(10), kl.dtype)
    low, high = jax.lax.fori_loop(0, 64, halve, (low, jnp.full(kl.shape, highest * np.log(10), kl.dtype)))
    root = (low + high) / 2
    found, slope = jax.jvp(kl_at, (root,), (jnp.ones_like(root),))
    reached = (value.max() > value.min()) & (jnp.abs(found - kl) < 1e-4 * jnp.maximum(kl, 1e-2)) & (slope > 0)
    return jnp.where(reached, root, jnp.nan)

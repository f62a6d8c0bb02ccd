"""Win rates of procedures over a finite set of outcomes, ties included: exact, by enumeration, or by Monte Carlo.

The M outcomes of a prompt are on the last axis: laws are probabilities [...,M], `rank` [...,M] the level of each by
reward (`ranks`); what stands before is prompts, and broadcasts. Procedures that see ranks alone are exact in O(M); any
rule that keeps one of N draws is enumerated over the M^N tuples where they are few, and sampled where not. All is
differentiable in the probabilities: the gradient of W^P is the reward of InfAlign's fixed point (`fixed_point.solve`).
Source: arXiv 2412.19792.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32
from jaxalign._checks import check_rng, is_concrete
from jaxalign.infalign.procedures import Procedure
from jaxalign.shapes import Numbers, OutcomeRanks, Outcomes, PerResponse, Scalar
from jaxalign.types import Array, ArrayLike


class Rule(Protocol):
    """Drawn outcomes [...,N] -> the probability [...,N] with which each draw is the one that is kept; adds to 1."""

    def __call__(self, drawn: Array, /) -> Array: ...


_MOST_TUPLES = 1 << 20


def ranks(score: ArrayLike) -> OutcomeRanks:
    """Gives the dense rank of each score from 0, equal for equal scores.

    Args:
      score: [...,M].

    Returns:
      [...,M] int. Under jit a NaN makes its prompt's ranks −1, and what is computed from them NaN.

    Raises:
      ValueError: no outcomes; on concrete values a NaN.
    """
    score = jnp.asarray(score)
    if score.ndim == 0 or score.shape[-1] == 0:
        raise ValueError(f"score: expected shape [...,M], M at least 1, found {score.shape}")
    if is_concrete(score) and bool(np.isnan(np.asarray(score)).any()):
        raise ValueError("score: expected numbers, found NaN")
    order = jnp.argsort(score, axis=-1)
    ordered = jnp.take_along_axis(score, order, axis=-1)
    new = jnp.concatenate([jnp.zeros_like(ordered[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], axis=-1)
    found = jnp.take_along_axis(jnp.cumsum(new, axis=-1), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(jnp.isnan(score).any(axis=-1, keepdims=True), -1, found)


def _pooled(prob: ArrayLike, rank: ArrayLike) -> tuple[Array, Array]:
    """(mass [...,M] of each level, those past the last one empty; rank [...,M] of the same shape)."""
    prob, rank = jnp.broadcast_arrays(at_least_float32(prob), jnp.asarray(rank))
    count = prob.shape[-1]
    if not jnp.issubdtype(rank.dtype, jnp.integer):
        raise ValueError(f"rank: expected whole numbers (`ranks` makes them of scores), found {rank.dtype}")
    if is_concrete(rank) and not bool(np.all((np.asarray(rank) >= 0) & (np.asarray(rank) < count))):
        raise ValueError(f"rank: expected ranks from 0 to {count - 1}, found {np.asarray(rank)}")

    def mass_of_levels(p: Array, k: Array) -> Array:
        return jax.ops.segment_sum(p, k, num_segments=count)

    mass = jax.vmap(mass_of_levels)(prob.reshape(-1, count), rank.reshape(-1, count)).reshape(prob.shape)
    return jnp.where((rank < 0).any(axis=-1, keepdims=True), jnp.nan, mass), rank


def _upto(mass: Array) -> Array:
    """F_k [...,M]; the top level ends at 1, whatever rounding says of the sum."""
    upto = jnp.cumsum(mass, axis=-1)
    # Rounding takes F above 1 by a digit; its derivative is right there too, so the cut must not drop it.
    return (upto + jax.lax.stop_gradient(jnp.minimum(upto, 1) - upto)).at[..., -1].set(1)


def _before(upto: Array) -> Array:
    """F_{k−1} [...,M]."""
    return jnp.concatenate([jnp.zeros_like(upto[..., :1]), upto[..., :-1]], axis=-1)


def _of_each(level: Array, rank: Array) -> Array:
    """The value [...,M] of each outcome's level."""
    return jnp.take_along_axis(level, rank, axis=-1)


def mid_rank(prob: ArrayLike, *, rank: ArrayLike) -> Outcomes:
    """Gives the exact calibrated reward, C(y) = Pr_z(r(z) < r(y)) + ½·Pr(r(z) = r(y)) for z ~ prob.

    Args:
      prob: [...,M], the law of z.
      rank: [...,M], of each outcome by reward.

    Returns:
      [...,M] in [0, 1].

    Raises:
      ValueError: ranks that are no whole numbers; on concrete values, ranks outside 0 to M−1.
    """
    mass, rank = _pooled(prob, rank)
    return _of_each(jnp.cumsum(mass, axis=-1) - mass / 2, rank)


def selected(prob: ArrayLike, *, rank: ArrayLike, procedure: Procedure) -> Outcomes:
    """Gives the law of what a procedure emits: level k gets G(F_k) − G(F_{k−1}), shared by its outcomes in proportion
    to prob.

    For best-of-N that is F_k^N − F_{k−1}^N, for worst-of-N S_k^N − S_{k+1}^N.

    Args:
      prob: [...,M], the law of each draw.
      rank: [...,M], by which the procedure ranks; it may be that of another reward than the one that win rates are
        counted with.
      procedure: P.

    Returns:
      [...,M], a law.

    Raises:
      ValueError: as `mid_rank`.
    """
    prob = at_least_float32(prob)
    mass, rank = _pooled(prob, rank)
    upto = _upto(mass)
    below = _before(upto)
    # Emitted per mass. Of a small mass the quotient has no digits, but Simpson's rule is exact to its fourth power, and
    # so are its first two derivatives.
    small = mass < jnp.cbrt(jnp.finfo(prob.dtype).eps)
    quotient = (procedure.cumulative(upto) - procedure.cumulative(below)) / jnp.where(small, 1, mass)
    ends, middle = procedure.density(upto) + procedure.density(below), procedure.density((upto + below) / 2)
    return prob * _of_each(jnp.where(small, (ends + 4 * middle) / 6, quotient), rank)


def win_rate(emitted: ArrayLike, *, against: ArrayLike, rank: ArrayLike) -> Numbers:
    """Gives E[1[r(y) > r(z)] + ½·1[r(y) = r(z)]] for independent y ~ emitted and z ~ against.

    Args:
      emitted: [...,M], the law of y.
      against: [...,M], the law of z.
      rank: [...,M], of each outcome by reward.

    Returns:
      [...] in [0, 1].

    Raises:
      ValueError: as `mid_rank`.
    """
    return (at_least_float32(emitted) * mid_rank(against, rank=rank)).sum(axis=-1)


def procedure_win_rate(
    prob: ArrayLike,
    *,
    base: ArrayLike,
    rank: ArrayLike,
    procedure: Procedure,
    selection_rank: ArrayLike | None = None,
) -> Numbers:
    """Gives the win rate with a procedure on both sides, W^P(pi > base) = Σ_y P(pi)(y)·C_{r,P(base)}(y).

    Args:
      prob: [...,M], pi.
      base: [...,M].
      rank: [...,M], of each outcome by reward.
      procedure: P.
      selection_rank: [...,M], the ranks by which the procedure picks, where they are not those that win rates are
        counted with.

    Returns:
      [...] in [0, 1].

    Raises:
      ValueError: as `mid_rank`.
    """
    if selection_rank is not None:
        mine, other = (selected(law, rank=selection_rank, procedure=procedure) for law in (prob, base))
        return win_rate(mine, against=other, rank=rank)
    middle = _emitted_mid(base, rank, procedure)
    upto = _upto(_pooled(prob, rank)[0])[..., :-1]
    # Σ_k (G(F_k) − G(F_{k−1}))·mid_k, summed by parts.
    return middle[..., -1] - (procedure.cumulative(upto) * jnp.diff(middle, axis=-1)).sum(axis=-1)


def _emitted_mid(base: ArrayLike, rank: ArrayLike, procedure: Procedure) -> Array:
    """Mid-ranks [...,M] of the levels under P(base): the mean of G at both ends of a level."""
    upto = procedure.cumulative(_upto(_pooled(base, rank)[0]))
    return (upto + _before(upto)) / 2


def win_rate_gradient(prob: ArrayLike, *, base: ArrayLike, rank: ArrayLike, procedure: Procedure) -> Outcomes:
    """Gives dW^P/dpi(y) up to a constant in y: the transformed reward of the fixed point.

    It is −Σ_{k >= level(y)} g(F_k)·(mid_{k+1} − mid_k), mid the mid-ranks of P(base), and increases with the level.

    Args:
      prob: [...,M], pi.
      base: [...,M].
      rank: [...,M], of each outcome by reward.
      procedure: P, on both sides.

    Returns:
      [...,M]; 0 at the highest level.

    Raises:
      ValueError: as `mid_rank`.
    """
    mass, rank = _pooled(prob, rank)
    step = jnp.diff(_emitted_mid(base, rank, procedure), axis=-1)
    term = procedure.density(_upto(mass)[..., :-1]) * step
    below = -jnp.flip(jnp.cumsum(jnp.flip(term, -1), axis=-1), -1)
    return _of_each(jnp.concatenate([below, jnp.zeros_like(mass[..., :1])], axis=-1), rank)


def keep_best(score: ArrayLike) -> Rule:
    """Gives the rule of best-of-N, ties kept with equal probability; with −score that of worst-of-N.

    Args:
      score: [M], of each outcome.

    Returns:
      A Rule.
    """
    score = jnp.asarray(score)

    def rule(drawn: Array) -> Array:
        found = score[drawn]
        top = (found == found.max(axis=-1, keepdims=True)).astype(jnp.result_type(float))
        return top / top.sum(axis=-1, keepdims=True)

    return rule


def _kept(rule: Rule, drawn: Array) -> Array:
    """rule(drawn) [...,N], whose shape is checked. ValueError that names the function."""
    found = rule(drawn)
    if np.shape(found) != drawn.shape:
        name = getattr(rule, "__qualname__", repr(rule))
        raise ValueError(f"rule {name}: expected a probability per draw, shape {drawn.shape}, found {np.shape(found)}")
    return jnp.asarray(found)


def enumerated(prob: ArrayLike, rule: Rule, n: int) -> PerResponse:
    """Gives the law of what a rule keeps of N independent draws, by enumeration of the M^N tuples.

    P(y) = Σ_tuples Π_i prob(y_i)·Σ_i keep_i·1[y_i = y]

    Args:
      prob: [M], the law of each draw.
      rule: which draw is kept.
      n: N >= 1 draws.

    Returns:
      [M], a law.

    Raises:
      ValueError: more than 2^20 tuples (see `sampled_win_rate`), a rule that gives another shape.
    """
    prob = at_least_float32(prob)
    drawn = _tuples(prob.shape[-1], n)
    weight = prob[drawn].prod(axis=-1, keepdims=True) * _kept(rule, jnp.asarray(drawn)).astype(prob.dtype)
    return jax.ops.segment_sum(weight.reshape(-1), jnp.asarray(drawn.reshape(-1)), num_segments=prob.shape[-1])


def rule_win_rate(prob: ArrayLike, *, base: ArrayLike, rank: ArrayLike, rule: Rule, n: int) -> Scalar:
    """Gives the win rate with any rule that keeps one of N draws on both sides, W^P(pi > base), by enumeration.

    Args:
      prob: [M], pi.
      base: [M].
      rank: [M], of each outcome by reward.
      rule: which draw is kept.
      n: N >= 1 draws.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: as `enumerated` and `mid_rank`.
    """
    return win_rate(enumerated(prob, rule, n), against=enumerated(base, rule, n), rank=rank)


@functools.cache
def _tuples(count: int, n: int) -> np.ndarray:
    """[M^N, N] outcomes."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, found {n}")
    if count**n > _MOST_TUPLES:
        raise ValueError(f"n: expected at most 2^20 tuples, found {count}^{n}")
    return np.array(list(itertools.product(range(count), repeat=n)), np.int32)


class Sampled(NamedTuple):
    """A win rate estimated from samples."""

    mean: Scalar
    """The estimate."""
    half_width: Scalar
    """Of its 95 % interval."""


@jax.custom_jvp
def _without_derivative(log_law: Array) -> Array:
    return log_law


@_without_derivative.defjvp
def _refuse(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    raise ValueError("sampled_win_rate: expected no derivative, which its draws do not have (rule_win_rate has one)")


def sampled_win_rate(
    rng: Array, *, log_prob: ArrayLike, log_base: ArrayLike, rank: ArrayLike, rule: Rule, n: int, pairs: int
) -> Sampled:
    """Estimates W^P(pi > base) of any rule from independent pairs of N draws a side, without bias.

    It refuses to be differentiated: of given draws the derivative is 0, which is not that of W^P. `rule_win_rate` has
    one.

    Args:
      rng: a key; consumed.
      log_prob: [M], pi, normalised or not.
      log_base: [M], likewise.
      rank: [M], of each outcome by reward.
      rule: which draw is kept.
      n: N >= 1 draws.
      pairs: >= 2.

    Returns:
      A Sampled, with its interval by the normal approximation.

    Raises:
      ValueError: counts below these, an rng that is no key, a rule that gives another shape, a derivative.
    """
    if pairs < 2 or n < 1:
        raise ValueError(f"pairs, n: expected at least 2 and 1, found {pairs} and {n}")
    check_rng(rng)
    ranks = jnp.asarray(rank)

    def kept(rng: Array, log_law: Any) -> Array:
        draw, choose = jax.random.split(rng)
        drawn = jax.random.categorical(draw, at_least_float32(log_law), shape=(pairs, n))
        which = jax.random.categorical(choose, jnp.log(_kept(rule, drawn)))
        return ranks[jnp.take_along_axis(drawn, which[:, None], axis=-1)[:, 0]]

    left, right = jax.random.split(rng)
    mine, other = (
        kept(key, _without_derivative(at_least_float32(x))) for key, x in ((left, log_prob), (right, log_base))
    )
    won = jnp.where(mine > other, 1.0, jnp.where(mine == other, 0.5, 0.0))
    return Sampled(won.mean(), 1.96 * won.std(ddof=1) / np.sqrt(pairs))

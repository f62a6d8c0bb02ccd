"""Readings of a distributional critic: which tilt its law of rewards is read for (`critics.distribution`).

A head gives the law p(s) of the reward of the base's response from a prefix s, on support points c_1 ≤ … ≤ c_K. Two
kinds of reading make it a critic, after training and without a new one:

- a log-weight reading weighs the support, q(s) = log Σ_i p_i(s)·omega_i. It is linear in p, and so the tokens that it
  chooses, under `tilt` with beta 1, have the law pi_ref(y)·omega(r(y)) of the whole response.
- a reward reading gives q(s) in units of reward, for any beta.

Their numbers (beta, bound, n, …) are parameters: scalars, or one per prompt, and none of them is a new trace. The law
of the prompt, p(x), is read once: thresholds, quantiles and budgets come from it. Source of the head: arXiv 2502.20548;
the readings beside `soft` are derived.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxalign import gibbs, shaping
from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported
from jaxalign._builders import cached
from jaxalign._parts import check_function_argument
from jaxalign.critics._reading import LogOmega, Numbers, Read, Value, of
from jaxalign.types import Array

__all__ = [
    "LogOmega",
    "Quantiles",
    "Read",
    "RewardMap",
    "Value",
    "best_of",
    "calibrated",
    "chi_squared",
    "cvar",
    "exceedance",
    "expected_max",
    "follower",
    "kl",
    "mean",
    "of",
    "quantile",
    "shaped",
    "soft",
    "worst_of",
]


class RewardMap(Protocol):
    """A map of rewards: f(params, support [K]) -> [K] or [B,K]."""

    def __call__(self, params: Any, reward: Array, /) -> Array: ...


class Quantiles(Protocol):
    """A transform of quantiles in [0, 1], as those of `jaxalign.infalign`."""

    def __call__(self, quantile: Array, /) -> Array: ...


def _columns(numbers: Numbers, name: str) -> Array:
    """A number as [1] or [B,1], which broadcasts against [B,K]."""
    return at_least_float32(numbers[name])[..., None]


def soft() -> Read:
    """Gives the reading V_soft/beta of the KL-regularised optimum: omega_i = exp(c_i/beta).

    Numbers: beta > 0. `tilt` with beta 1 then has the law of pi_ref(y)·exp(r^/beta)/Z, with r^ the reward rounded at
    random to the support; on a grid of width w the log-ratio to the law of r itself is at most g(w/beta) ≤ (w/beta)²/8.
    q and log Z are those of r − `origin`, which is r unless all rewards lie far from 0 beside their differences.

    Returns:
      A log-weight reading.
    """
    return Read("soft", ("beta",), _soft, positive=("beta",), relative=True)


def _soft(numbers: Numbers, support: Array, log_p_prompt: Array) -> tuple[Array, Array]:
    beta = _columns(numbers, "beta")
    # The largest exponent is 0: a small beta leaves the range of float32 below, where it is a weight of zero.
    return (support - support[-1]) / beta, support[-1] / beta


def _share_above(support: Array, threshold: Array, *, beyond: float = 0.0) -> Array:
    """Ψ_i [...,K]: the share of a support point's cell, from midpoint to midpoint, above the threshold.

    No reward lies beyond the support, where the first and the last cell end: Ψ is 1 below it and 0 from its end on.
    beyond: by how much of their inner half they reach over it all the same."""
    middle = (support[1:] + support[:-1]) / 2
    ends = jnp.stack(
        [support[0] - beyond * (middle[0] - support[0]), support[-1] + beyond * (support[-1] - middle[-1])]
    )
    low = jnp.concatenate([ends[:1], middle])
    high = jnp.concatenate([middle, ends[1:]])
    width = high - low
    inside = (high - threshold) / jnp.where(width > 0, width, 1)
    return jnp.where(width > 0, jnp.clip(inside, 0, 1), (support > threshold).astype(inside.dtype))


def _atoms_above(support: Array, threshold: Array) -> Array:
    """1[c > m] of atoms; of two atoms at one point the right one is above it."""
    twin = jnp.concatenate([jnp.zeros(1, bool), support[1:] == support[:-1]])  # the right one of two equal points
    share = ((support > threshold) | (twin & (support == threshold))).astype(support.dtype)
    return jnp.where(jnp.isnan(threshold), jnp.nan, share)  # a comparison with NaN would be False in silence


@cached
def follower(*, solve: bool = False) -> Read:
    """Gives the reading of the follower of B·1[r > m]: omega_i = 1 + (e^{B/beta} − 1)·Ψ_i(m).

    Numbers: beta and bound > 0, and the threshold m, or with `solve` none: m is then the leader's optimum for the law
    of the prompt, `shaping.optimal_threshold`. Ψ is 1[c > m] where every reward is a support point, and the reading is
    exact; on a grid it is the share of a point's cell above m, a trapezoid in place of the step. Nothing exceeds a
    threshold at the end of the support; one that is solved lies below the last point, whose cell is then whole, since
    it was solved for a law that has the point as an atom.

    Args:
      solve: whether the threshold is solved from the law of the prompt.

    Returns:
      A log-weight reading.
    """
    names = ("beta", "bound") if solve else ("beta", "bound", "threshold")
    share = functools.partial(_share_above, beyond=1.0 if solve else 0.0)
    grid, atoms = (functools.partial(_follower, above, solve) for above in (share, _atoms_above))
    return Read("follower", names, grid, positive=("beta", "bound"), on_atoms=atoms, relative=solve)


def _follower(above: Any, solve: bool, numbers: Numbers, support: Array, log_p_prompt: Array) -> tuple[Array, Array]:
    gain = _columns(numbers, "bound") / _columns(numbers, "beta")
    if solve:
        threshold = shaping.optimal_threshold(support, log_base=log_p_prompt, gain=gain[..., 0])[..., None]
    else:
        threshold = _columns(numbers, "threshold")
    share = above(support, threshold)
    # As a sum of logarithms: e^−gain is zero in float32 from a gain of 104, where a share of zero would lose q = 0.
    low, high = (jnp.where(part > 0, jnp.log(jnp.where(part > 0, part, 1)), NEGATIVE) for part in (1 - share, share))
    return jnp.logaddexp(jnp.where(jnp.isnan(share), share, low - gain), high), gain


@cached
def shaped(reward_map: RewardMap) -> Read:
    """Gives the reading of any map of rewards, chosen after training: omega_i = exp(f(map, c_i)/beta).

    Numbers: beta > 0, and `map`, the parameters of the function.

    Args:
      reward_map: f(params, support [K]) -> [K] or [B,K].

    Returns:
      A log-weight reading.

    Raises:
      ValueError: what is no function.
    """
    check_function_argument("reward_map", reward_map)

    def log_omega(numbers: Numbers, support: Array, log_p_prompt: Array) -> Array:
        return reward_map(numbers["map"], support) / _columns(numbers, "beta")

    return Read("shaped", ("beta",), log_omega, positive=("beta",), free=("map",))


@cached
def calibrated(transform: Quantiles) -> Read:
    """Gives the reading of InfAlign's tilt, without a table: omega_i = exp(phi(C_i)/beta), C_i the mid-quantile of c_i
    in the law of the prompt, Σ_{j<i} p_j(x) + p_i(x)/2.

    Numbers: beta > 0.

    Args:
      transform: phi of quantiles, as `infalign.exponential(5.0)`.

    Returns:
      A log-weight reading.

    Raises:
      ValueError: what is no function.
    """
    check_function_argument("transform", transform)

    def log_omega(numbers: Numbers, support: Array, log_p_prompt: Array) -> Array:
        p = jnp.exp(log_p_prompt)
        return transform(jnp.clip(jnp.cumsum(p, axis=-1) - p / 2, 0, 1)) / _columns(numbers, "beta")

    return Read("calibrated", ("beta",), log_omega, positive=("beta",))


def best_of() -> Read:
    """Gives the reading whose tokens have the law of best-of-n: omega_i = (F_i^n − F_{i−1}^n)/p_i(x), F the cumulative
    of the law of the prompt.

    Numbers: n > 0, real.

    Returns:
      A log-weight reading.
    """
    return Read("best_of", ("n",), _best_of, positive=("n",))


def _best_of(numbers: Numbers, support: Array, log_p_prompt: Array) -> Array:
    n = _columns(numbers, "n")
    log_f = _log_cumulative(log_p_prompt)
    # (F^n − (F − p)^n)/p = F^n·(1 − (1 − p/F)^n)/p, without a difference of near numbers. At the first mass p = F.
    share = jnp.exp(jnp.minimum(log_p_prompt - log_f, 0))
    none, reached = share <= 1e-30, is_supported(log_f)
    inner = jnp.where(none, 0.5, share)
    below = jnp.concatenate([jnp.full_like(log_f[..., :1], NEGATIVE), log_f[..., :-1]], axis=-1) - log_f
    # log(1 − p/F), by whichever form keeps its digits.
    rest = jnp.where(inner < 0.9, jnp.log1p(-jnp.minimum(inner, 0.9)), jnp.where(reached, below, -1.0))
    ratio = jnp.where(none, jnp.log(n), jnp.log(-jnp.expm1(n * rest)) - jnp.log(inner))
    return jnp.where(reached, (n - 1) * log_f + ratio, jnp.where(n > 1, NEGATIVE, 0.0))


def _log_cumulative(log_p: Array) -> Array:
    """log F_i [...,K], F_i = Σ_{j≤i} p_j."""
    return jnp.minimum(jax.lax.cumlogsumexp(log_p, axis=log_p.ndim - 1), 0.0)


def worst_of() -> Read:
    """Gives the reading whose tokens have the law of worst-of-n: `best_of` with the support read from its end.

    Numbers: n > 0, real.

    Returns:
      A log-weight reading.
    """

    return Read("worst_of", ("n",), _worst_of, positive=("n",))


def _worst_of(numbers: Numbers, support: Array, log_p_prompt: Array) -> Array:
    return jnp.flip(_best_of(numbers, support, jnp.flip(log_p_prompt, axis=-1)), axis=-1)


def chi_squared() -> Read:
    """Gives the reading of the chi-squared regularised optimum, omega_i = max(0, (c_i − l)/beta).

    l is the root of Σ_i p_i(x)·omega_i = 1. Numbers: beta > 0, in units of reward.

    Returns:
      A log-weight reading.

    Source: inference-time pessimism, arXiv 2503.21878.
    """
    return Read("chi_squared", ("beta",), _chi_squared, positive=("beta",), relative=True)


def _chi_squared(numbers: Numbers, support: Array, log_p_prompt: Array) -> Array:
    beta, p = _columns(numbers, "beta"), jnp.exp(log_p_prompt)
    # With the points from i on in use l_i = (Σ p·c − beta)/Σ p; l is the smallest of them with l_i < c_i, which is the
    # largest of all, since Σ p·(c − l)^+ is convex in l. Centred, so that the difference keeps its digits.
    c = support - support[-1]
    mass = jnp.flip(jnp.cumsum(jnp.flip(p, -1), -1), -1)
    total = jnp.flip(jnp.cumsum(jnp.flip(p * c, -1), -1), -1)
    root = jnp.where(mass > 0, (total - beta) / jnp.where(mass > 0, mass, 1), NEGATIVE).max(axis=-1, keepdims=True)
    above = ~(c <= jax.lax.stop_gradient(root))  # a root that is NaN shows in the weights
    # Again from the points in use alone: the derivatives of the others' quotients overflow where a tail has no mass.
    mass, total = (jnp.where(above, x, 0).sum(axis=-1, keepdims=True) for x in (p, p * c))
    root = (total - beta) / jnp.where(mass > 0, mass, 1)
    return jnp.where(above, jnp.log(jnp.where(above, (c - root) / beta, 1)), NEGATIVE)


def kl() -> Read:
    """Gives the reading of `soft` at the beta that spends a budget: KL of the whole response = nats, for each prompt.

    Numbers: nats > 0. On a grid the KL of the rounded rewards equals the budget, and that of responses is at most it.

    Returns:
      A log-weight reading.
    """
    return Read("kl", ("nats",), _kl, positive=("nats",), relative=True)


def _kl(numbers: Numbers, support: Array, log_p_prompt: Array) -> tuple[Array, Array]:
    return _soft({"beta": gibbs.match_kl(log_p_prompt, support, kl=numbers["nats"])}, support, log_p_prompt)


def mean() -> Read:
    """Gives the reading Σ_i p_i·c_i, controlled decoding's V_ref, exact on any support that covers the rewards.

    Returns:
      A reward reading, without numbers.
    """
    return Read("mean", (), value=_mean)


def _mean(numbers: Numbers, support: Array, log_p: Array, log_p_prompt: Array) -> Array:
    return (jnp.exp(log_p) * support).sum(axis=-1)


@cached
def exceedance() -> Read:
    """Gives the probability Pr_ref(r > m) from a prefix, for filters.

    Numbers: the threshold m.

    Returns:
      A reward reading; its unit is 1. On a grid it is that of a trapezoid, as in `follower`.
    """
    grid, atoms = (functools.partial(_exceedance, above) for above in (_share_above, _atoms_above))
    return Read("exceedance", ("threshold",), value=grid, on_atoms=atoms)


def _exceedance(above: Any, numbers: Numbers, support: Array, log_p: Array, log_p_prompt: Array) -> Array:
    share: Array = above(support, numbers["threshold"][..., None])
    return (jnp.exp(log_p) * share).sum(axis=-1)


def expected_max() -> Read:
    """Gives the expected best reward of n continuations, Σ_i c_i·(F_i^n − F_{i−1}^n) with F the prefix's own.

    It is not linear in p: a tilt by it is not best-of-n (`best_of` is).

    Numbers: n > 0.

    Returns:
      A reward reading.
    """
    return Read("expected_max", ("n",), value=_expected_max, positive=("n",))


def _expected_max(numbers: Numbers, support: Array, log_p: Array, log_p_prompt: Array) -> Array:
    power = jnp.exp(numbers["n"][..., None] * _log_cumulative(log_p))
    return support[-1] - (power[..., :-1] * jnp.diff(support)).sum(axis=-1)  # summed by parts: F_K = 1


def quantile() -> Read:
    """Gives the quantile of a prefix's law: the first c_i with F_i ≥ level.

    Numbers: level, in (0, 1].

    Returns:
      A reward reading.
    """
    return Read("quantile", ("level",), value=_quantile, shares=("level",))


def _quantile(numbers: Numbers, support: Array, log_p: Array, log_p_prompt: Array) -> Array:
    reached = jnp.cumsum(jnp.exp(log_p), axis=-1)
    below = reached < numbers["level"][..., None]
    first = jnp.minimum(below.sum(axis=-1), support.shape[0] - 1)  # rounding may leave F_K below a level near 1
    return jnp.where(jnp.isnan(reached[..., -1]), jnp.nan, support[first])  # a comparison with NaN is False in silence


def cvar() -> Read:
    """Gives the mean of the worst share of a prefix's law, Σ_i c_i·(min(F_i, a) − min(F_{i−1}, a))/a.

    Numbers: level a, in (0, 1].

    Returns:
      A reward reading.
    """
    return Read("cvar", ("level",), value=_cvar, shares=("level",))


def _cvar(numbers: Numbers, support: Array, log_p: Array, log_p_prompt: Array) -> Array:
    level = numbers["level"][..., None]
    reached = jnp.minimum(jnp.cumsum(jnp.exp(log_p), axis=-1), level)
    reached = jnp.concatenate([reached[..., :-1], jnp.broadcast_to(level, (*reached.shape[:-1], 1))], axis=-1)
    masses = jnp.diff(reached, axis=-1, prepend=0.0)
    return (support * masses).sum(axis=-1) / at_least_float32(numbers["level"])

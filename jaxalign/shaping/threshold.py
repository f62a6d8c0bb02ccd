"""The leader's optimum in closed form: the threshold, the rewards it defines, the follower's answer to them.

Throughout, gain = bound/beta: what the follower multiplies a rewarded response's weight by is e^gain. Arrays have one
prompt's responses (or samples) on their last axis; what stands before is prompts. Source: arXiv 2602.02572.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import NEGATIVE, at_least_float32, column, is_supported
from jaxalign._checks import check_positive, is_concrete
from jaxalign.shapes import Numbers, Samples
from jaxalign.types import Array, ArrayLike

ABSENT = -87.0
"""Log of the smallest normalised weight that counts [nats]: below it float32 has no normal number."""


def optimal_threshold(
    utility: ArrayLike, *, log_base: ArrayLike | None = None, gain: ArrayLike, max_gain: float | None = None
) -> Numbers:
    """Gives the threshold m* = max over r in [0, bound] of E_{pi_r}[u]: the utility delivered, and what delivers it.

    m* is the only root of F(m) = Σ p·w_m·(u − m), w_m = e^gain where u >= m, else 1 (theorem 2): an expectile of the
    utility. It lies between the base's mean (gain 0) and the maximum (gain -> inf), and does not decrease in gain.

    Args:
      utility: [...,n], of one prompt's responses or samples.
      log_base: [...,n], log weights, normalised or not; None: n samples of equal weight. Responses of normalised log
        weight below −87 count as absent, whatever their utility.
      gain: bound/beta >= 0, scalar or [...].
      max_gain: a cap on the gain; None for no cap.

    Returns:
      [...], in units of u. In float32 right for gains from 0 to 1e4, to rounding of the utility's range, and rounded
      down, so that `threshold_reward` pays whom it should; exact where all utilities are equal.

    Raises:
      ValueError: no samples; on concrete values also utilities that are not finite where they count, gain < 0, weights
        that are all zero. Under jit such input gives NaN.

    F is convex and piecewise linear, so Newton's iteration from the mean climbs to the root and ends exactly, when the
    set above the threshold no longer changes (5 to 11 passes of O(n); no sort). Its derivatives, in both modes and to
    any order, are those of E_pi*[u] with that set: dm*/du = pi*, dm*/d log_base = pi*·(u − m*),
    dm*/dgain = Σ_{u >= m*} pi*·(u − m*).
    """
    utility = at_least_float32(utility)
    # Behind a barrier: the compiler would fold sums over a constant of the samples' size, for seconds.
    even = jax.lax.optimization_barrier(jnp.zeros_like(utility)) if log_base is None else log_base
    log_base = at_least_float32(even)
    gain = at_least_float32(gain)
    if utility.ndim == 0 or utility.shape[-1] == 0:
        raise ValueError(f"utility: expected at least one response on the last axis, found shape {utility.shape}")
    utility, log_base = jnp.broadcast_arrays(utility, log_base)
    _check(utility, log_base, gain)
    if max_gain is not None:
        gain = jnp.minimum(gain, max_gain)
    dtype = jnp.result_type(utility, log_base, gain)
    batch = jnp.broadcast_shapes(utility.shape[:-1], gain.shape)
    utility, log_base = (jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in (utility, log_base))
    gain = jnp.broadcast_to(gain, batch)
    result: Array = _threshold(utility.astype(dtype), log_base.astype(dtype), gain.astype(dtype))
    return result


def _check_gain(gain: Array) -> None:
    if is_concrete(gain) and not np.all(np.asarray(gain) >= 0):
        raise ValueError(f"gain: expected bound/beta >= 0, found {np.asarray(gain)}")


def _check(utility: Array, log_base: Array, gain: Array) -> None:
    _check_gain(gain)
    if not is_concrete(utility, log_base):
        return
    # In numpy: inside a trace, jax would turn these constants into tracers.
    log_weight = np.asarray(log_base, np.float64)
    if np.isnan(log_weight).any() or np.isposinf(log_weight).any():
        raise ValueError("log_base: expected log weights, found NaN or +infinity")
    log_weight = np.where(log_weight <= NEGATIVE / 2, -np.inf, log_weight)
    if not np.isfinite(log_weight).any(axis=-1).all():
        raise ValueError("log_base: expected a response of positive weight for each prompt, found none")
    log_weight = log_weight - np.logaddexp.reduce(log_weight, axis=-1, keepdims=True)
    if not np.isfinite(np.asarray(utility)[log_weight >= ABSENT]).all():
        raise ValueError("utility: expected finite numbers, found NaN or infinity")


def normalised_weights(log_base: Array) -> tuple[Array, Array]:
    """(normalised log weights, those that are present)."""
    inside = is_supported(log_base)
    log_weight = jnp.where(inside, log_base, -jnp.inf)
    log_weight = log_weight - jax.nn.logsumexp(log_weight, axis=-1, keepdims=True)
    return log_weight, ~(log_weight < ABSENT)


@jax.jit  # op by op, each call would compile the loop anew
def _threshold(utility: Array, log_base: Array, gain: Array) -> Array:
    """The root, with the derivatives of E_pi*[u], which it is while the set above it stays: no rule of its own, which
    jax would drop inside a `lax.scan`, nor derivatives of the climb."""
    m = _climbed(*jax.lax.stop_gradient((utility, log_base, gain)))
    log_weight, present = normalised_weights(log_base)
    # The gain is taken off below, not put on above, where at 1e4 it would leave three digits of the weights.
    above = utility >= m[..., None]
    logit = jnp.where(present, log_weight - jnp.where(above, 0, gain[..., None]), -jnp.inf)
    margin = jnp.where(present, utility - m[..., None], 0)
    mean = (jax.nn.softmax(logit, axis=-1) * margin).sum(axis=-1)
    return m + (mean - jax.lax.stop_gradient(mean))


def _climbed(utility: Array, log_base: Array, gain: Array) -> Array:
    log_weight, present = normalised_weights(log_base)
    top = jnp.where(present, utility, -jnp.inf).max(axis=-1, keepdims=True)
    # Shifted by the maximum, all terms are <= 0: sums keep their digits, and identical utilities give exactly 0. In
    # units of the range, sums of weights up to e^80 stay within float32 for utilities of any size.
    below = jnp.where(present, utility - top, 0)
    spread = -below.min(axis=-1, keepdims=True)
    below = below / jnp.where(spread == 0, 1, spread)
    # Half the gain on either side of 1. At 160 a weight of e^-87 outweighs all others by e^73: more changes no digit.
    half = jnp.minimum(jnp.where(gain >= 0, gain, jnp.nan), 160.0)[..., None] / 2
    weight = jnp.where(present, jnp.exp(log_weight), 0)
    # e^-80·(mass below) is lost beside e^80·(mass above), as it should be; e^80·1 is within float32.
    high, low = weight * jnp.exp(half), weight * jnp.exp(-half)

    def mean(m: Array) -> Array:
        w = jnp.where(below >= m[..., None], high, low)
        return (w * below).sum(axis=-1) / w.sum(axis=-1)

    # A utility that the iterate met in all digits may belong on either side; what it is worth to leave it out is seen
    # by doing so. Each mean is a lower bound of m*, so the larger is right.
    slack = 4 * jnp.finfo(below.dtype).eps

    def climb(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, stalled, _ = carry
        found = mean(jnp.where(stalled, m * (1 - slack), m))
        # Rounding may lower the last iterate by a digit: the climb is over then.
        higher = found > m
        return jnp.where(found <= m, m, found), ~higher, stalled & ~higher  # a NaN stays

    start = (weight * below).sum(axis=-1) / weight.sum(axis=-1)
    fresh = jnp.zeros_like(start, bool)
    found, _, _ = jax.lax.while_loop(lambda carry: ~carry[2].all(), climb, (start, fresh, fresh))
    top, spread = top[..., 0], spread[..., 0]
    # Rounded down. At large gains the root agrees with a utility in all digits, and which side of it the threshold is
    # on decides: to pay too many costs at most the step, to pay too few e^gain times the step. Sums of one sign are
    # right to a few digits' last; tiny keeps the step a normal number at 0, where a comparison would flush it.
    step = 4 * jnp.finfo(top.dtype).eps * (jnp.abs(top) - found * spread) + jnp.finfo(top.dtype).tiny
    return jnp.where(spread == 0, top, top + found * spread - step)


def threshold_reward(utility: ArrayLike, *, threshold: ArrayLike, bound: ArrayLike) -> Samples:
    """Gives the threshold reward r = bound·1[u > m] (theorem 1).

    Identical utilities equal their threshold and get 0: no signal, no shaping. There is no gradient in u or m:
    differentiate `soft_threshold_reward`, or the utility delivered.

    Args:
      utility: [...,n].
      threshold: scalar or [...].
      bound: > 0, scalar or [...].

    Returns:
      [...,n]; NaN where the utility or its threshold is NaN.

    Raises:
      ValueError: bound <= 0.
    """
    check_positive("bound", bound)
    utility, threshold, bound = map(at_least_float32, (utility, threshold, bound))
    unknown = jnp.isnan(utility) | jnp.isnan(column(threshold))  # a comparison with NaN would pay 0 in silence
    return jnp.where(unknown, jnp.nan, column(bound) * (utility > column(threshold)))


def soft_threshold_reward(
    utility: ArrayLike, *, threshold: ArrayLike, bound: ArrayLike, sharpness: ArrayLike
) -> Samples:
    """Gives the sigmoid form of the threshold reward, r = bound·sigmoid(sharpness·(u − m)).

    The threshold is the hard one, not solved again.

    Args:
      utility: [...,n].
      threshold: scalar or [...].
      bound: > 0, scalar or [...].
      sharpness: scalar or [...], in 1/units of u; -> inf gives `threshold_reward`, 0 a constant.

    Returns:
      [...,n].

    Raises:
      ValueError: bound <= 0.
    """
    check_positive("bound", bound)
    utility, threshold, bound = map(at_least_float32, (utility, threshold, bound))
    return column(bound) * jax.nn.sigmoid(column(at_least_float32(sharpness)) * (utility - column(threshold)))


def kl_bound(gain: ArrayLike) -> Numbers:
    """Gives the largest KL(pi_r‖base) over every base and every r in [0, bound].

    It is z − 1 − ln z with z = L/(1 − e^−L), L = gain.

    Args:
      gain: bound/beta >= 0, any shape.

    Returns:
      In nats, in gain's shape; at most min(L, L²/8), 0 at L = 0. NaN under jit for gain < 0.

    Raises:
      ValueError: gain < 0.
    """
    gain = at_least_float32(gain)
    _check_gain(gain)
    gain = jnp.where(gain >= 0, gain, jnp.nan)
    small = gain < 0.1
    safe = jnp.where(small, 1.0, gain)
    excess = (safe + jnp.expm1(-safe)) / -jnp.expm1(-safe)
    near = jnp.where(small, gain, 0)
    return jnp.where(small, near**2 / 8 * (1 - near**2 / 72 + near**4 / 3240), excess - jnp.log1p(excess))


class Mixture(NamedTuple):
    """pi* = (1 − share)·base + share·base(· | u > m)."""

    share: Numbers
    """[...], the weight of the best part."""
    exceed: Numbers
    """[...], base(u > m)."""
    log_norm: Numbers
    """[...], log Z in nats."""


def mixture(utility: ArrayLike, *, log_base: ArrayLike | None = None, threshold: ArrayLike, gain: ArrayLike) -> Mixture:
    """Gives the follower's answer to the threshold reward as a mixture of the base and its best part.

    Args:
      utility: [...,n].
      log_base: [...,n], log weights; None: n samples of equal weight.
      threshold: scalar or [...].
      gain: bound/beta, scalar or [...].

    Returns:
      A Mixture.
    """
    utility, threshold, gain = map(at_least_float32, (utility, threshold, gain))
    log_base = jnp.zeros_like(utility) if log_base is None else at_least_float32(log_base)
    log_weight, present = normalised_weights(jnp.broadcast_to(log_base, utility.shape))
    above = present & (utility > column(threshold))
    exceed = jnp.where(above, jnp.exp(jnp.where(present, log_weight, 0)), 0).sum(axis=-1)
    log_exceed = jnp.where(exceed > 0, jnp.log(jnp.where(exceed > 0, exceed, 1)), -jnp.inf)
    # Z = 1 + (e^gain − 1)·q; 1 − 1/Z without cancelling.
    log_norm = _log_raised(exceed, jnp.log1p(-jnp.minimum(exceed, 1)), log_exceed, gain)
    return Mixture(-jnp.expm1(-log_norm), exceed, log_norm)


def accept_log_prob(utility: ArrayLike, *, threshold: ArrayLike, gain: ArrayLike) -> Samples:
    """Gives the log-probability of keeping a draw from the base, so that the draws kept follow pi*.

    Args:
      utility: [...,n].
      threshold: scalar or [...].
      gain: bound/beta, scalar or [...].

    Returns:
      [...,n]: 0 above the threshold, −gain elsewhere. See `decoding.rejection`.
    """
    utility, threshold, gain = map(at_least_float32, (utility, threshold, gain))
    return jnp.where(utility > column(threshold), 0, -column(gain))


def exceedance_log_weight(logit: ArrayLike, *, gain: ArrayLike) -> Numbers:
    """Gives the follower's exact weight of a prefix, log(1 + (e^gain − 1)·p), p = Pr_base(u > m | prefix).

    pi*(z|s) ∝ pi_ref(z|s)·(1 + (e^gain − 1)·p(sz)): as q of a tilt with beta 1 it gives the sequence optimum, which
    controlled decoding's q/beta = gain·p does not (it is the exponential's chord: equal at p = 0 and 1 only).

    Args:
      logit: of p, any shape.
      gain: bound/beta, a shape that broadcasts.

    Returns:
      In nats.
    """
    logit, gain = at_least_float32(logit), at_least_float32(gain)
    return _log_raised(jax.nn.sigmoid(logit), jax.nn.log_sigmoid(-logit), jax.nn.log_sigmoid(logit), gain)


def _log_raised(p: Array, log_rest: Array, log_p: Array, gain: Array) -> Array:
    """log(1 + (e^gain − 1)·p) of log(1 − p) and log p: a small gain keeps its digits, a large one does not overflow."""
    small = jnp.abs(gain) <= 1
    near = jnp.log1p(p * jnp.expm1(jnp.where(small, gain, 0)))
    return jnp.where(small, near, jnp.logaddexp(log_rest, gain + log_p))


def exceedance_soft_value(p: ArrayLike, *, bound: ArrayLike, beta: ArrayLike) -> Numbers:
    """Gives the soft value of a prefix that exceeds the threshold with probability p.

    V_soft = beta·log(1 + (e^(bound/beta) − 1)·p).

    Args:
      p: in [0, 1], any shape; strictly inside where it is differentiated.
      bound: of the reward.
      beta: > 0.

    Returns:
      In units of reward.

    Raises:
      ValueError: beta <= 0.
    """
    check_positive("beta", beta)
    p, bound, beta = map(at_least_float32, (p, bound, beta))
    return beta * _log_raised(p, jnp.log1p(-p), jnp.log(p), bound / beta)


def expectile_loss(prediction: ArrayLike, *, utility: ArrayLike, gain: ArrayLike) -> Numbers:
    """Gives the loss ½·w·(u − m̂)², w = 1 where u >= m̂, else e^−gain, elementwise.

    Its minimiser over u ~ base is the optimal threshold, so that m(x) can be learned from one sample a prompt.

    Args:
      prediction: m̂, any shape.
      utility: of that shape.
      gain: bound/beta.

    Returns:
      The loss, in that shape.
    """
    prediction, utility, gain = map(at_least_float32, (prediction, utility, gain))
    weight = jnp.where(utility >= prediction, 1.0, jnp.exp(-gain))
    return 0.5 * weight * (utility - prediction) ** 2

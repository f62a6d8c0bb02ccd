"""Losses that fit the log-ratio of a policy to its base to a known target, response by response."""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32
from jaxalign._checks import check_positive, is_concrete
from jaxalign.shapes import PerPrompt, Scalar
from jaxalign.types import Array, ArrayLike

FORMS = ("reverse", "forward", "square")
LOWEST_TARGET = -20.0
"""Lowest target of "reverse" and "forward" [nats]."""
HIGHEST_RATIO = 5.0
"""Log-ratio from which on the ratio within "reverse" and "forward" grows no further, a nat beyond
the target where that is higher [nats]."""


class RegressionLimits(NamedTuple):
    """How often `regress` held a term back."""

    floored: Scalar
    """Share of rows whose target is below `LOWEST_TARGET`."""
    capped: Scalar
    """Share of rows whose log-ratio is above `HIGHEST_RATIO`."""


def regress(
    log_ratio: PerPrompt,
    target: PerPrompt,
    *,
    form: Literal["reverse", "forward", "square"] = "reverse",
    weight: PerPrompt | None = None,
    group: ArrayLike | None = None,
    huber: float | None = None,
) -> Scalar:
    """Gives the loss of a policy's log-ratio to its base against that of the KL-regularised optimum.

    The optimum is pi* = pi_ref·exp(t), t = r/beta − log Z. With x = log(pi/pi_ref)(y), rho = e^x and w = e^t, the mean
    over rows of

        "square":  ½·(x − t)²
        "forward": rho − w·x − w + w·t, whose mean under pi_ref is KL(pi*‖pi) for a normalised pi
        "reverse": rho·(x − t) − rho + w, whose mean under pi_ref is KL(pi‖pi*), the regret of RL over beta

    Each is 0 where x = t and positive elsewhere, whatever law the responses are drawn from, and its gradient at pi* is
    0 for every single response. In "forward" and "reverse" t is floored at −20, and from x = 5 (or t + 1) on the
    gradient's rho grows no further (`regression_limits` counts both); the minimum stays where it is.

    Args:
      log_ratio: x [b], summed over the tokens of the whole response, its EOS included, in nats; no mean over tokens.
      target: t [b], in nats; data, not differentiated.
      form: which of the three.
      weight: [b] > 0, importance weights of rows that are not drawn from the base, such as pi_ref over the mean of the
        policies that drew them; None: 1.
      group: [b] ints, equal for responses of the same prompt: the prompt's (weighted) mean of x − t in the batch is
        subtracted, so that the target needs no log Z. For "square" alone, with at least 2 rows of each prompt.
      huber: δ > 0 in nats: "square" is linear beyond |x − t| = δ; None: nowhere.

    Returns:
      A scalar, in nats ("square": nats squared).

    Raises:
      ValueError: another form; a group or huber with another form than "square"; on concrete values a group of one row,
        a weight or huber that is not > 0, a target that is NaN.

    Source: QRPO, arXiv 2507.08068 (square with the quantile reward); A*-PO, arXiv 2505.20686.
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, found {form!r}")
    if form != "square":
        for name, value in (("group", group), ("huber", huber)):
            if value is not None:
                raise ValueError(f"{name}: expected with the square form alone, found {value} with {form}")
    chex.assert_equal_shape([log_ratio, target])
    x, t = at_least_float32(log_ratio), jax.lax.stop_gradient(at_least_float32(target))
    if is_concrete(t) and np.isnan(np.asarray(t)).any():
        raise ValueError("target: expected numbers, found NaN")
    if weight is not None:
        chex.assert_equal_shape([log_ratio, weight])
        check_positive("weight", weight)
        weight = at_least_float32(weight)
    if huber is not None:
        check_positive("huber", huber)
    if form == "square":
        if group is not None:
            t = t - _group_highest(t, jnp.asarray(group))  # or x would lose its digits beside an offset of the prompt's
        error = x - t
        if group is not None:
            error = error - _group_mean(error, jnp.asarray(group), weight)
        each = 0.5 * error**2
        if huber is not None:
            size = jnp.abs(error)
            each = jnp.where(size > huber, huber * (size - 0.5 * huber), each)
    else:
        each = _divergence(x, jnp.maximum(t, LOWEST_TARGET), reverse=form == "reverse")
    return each.mean() if weight is None else (weight * each).mean()


def regression_limits(log_ratio: PerPrompt, target: PerPrompt) -> RegressionLimits:
    """Counts the terms that `regress` holds back in "reverse" and "forward".

    Args:
      log_ratio, target: [b], as for `regress`.

    Returns:
      RegressionLimits, shares of the rows.
    """
    low, high = at_least_float32(target) < LOWEST_TARGET, at_least_float32(log_ratio) > HIGHEST_RATIO
    return RegressionLimits(low.astype(jnp.float32).mean(), high.astype(jnp.float32).mean())


def _divergence(x: Array, t: Array, *, reverse: bool) -> Array:
    """ "forward" or "reverse" of each row, as w·(…) of d = x − t, which keeps its digits near 0; beyond the cap the
    function goes on with the slope whose rho is that of the cap."""
    # A nat beyond a high target: the minimum must stay one.
    inside = jnp.minimum(x, jnp.maximum(t + 1, HIGHEST_RATIO))
    beyond = x - inside
    w, d = jnp.exp(t), inside - t
    top = jnp.exp(inside)
    if reverse:
        # ∫ rho·(x − t) with rho held: rho·(d·s + s²/2) over s = x − cap.
        return w * (d * jnp.exp(d) - jnp.expm1(d)) + top * (d * beyond + 0.5 * beyond**2)
    return w * (jnp.expm1(d) - d) + (top - w) * beyond


def _group_highest(t: Array, group: Array) -> Array:
    """Each row's highest target of its group [b]."""
    if group.shape != t.shape:
        raise ValueError(f"group: expected shape {t.shape}, found {group.shape}")
    return jnp.where(group[:, None] == group[None, :], t[None, :], -jnp.inf).max(axis=1)


def _group_mean(error: Array, group: Array, weight: Array | None) -> Array:
    """Each row's mean of its group [b]. ValueError for a group of one row."""
    same = (group[:, None] == group[None, :]).astype(error.dtype)
    if is_concrete(same) and bool((np.asarray(same).sum(axis=1) < 2).any()):
        raise ValueError("group: expected at least 2 rows of each prompt, found a prompt with one")
    share = same if weight is None else same * weight[None, :]
    return jnp.matmul(share, error, precision="highest") / share.sum(axis=1)

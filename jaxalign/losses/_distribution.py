"""The law of the reward from every prefix: rewards as laws on a support, and their cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.shapes import Numbers, Scalar
from jaxalign.types import Array, ArrayLike


def two_hot(reward: ArrayLike, *, support: Sequence[float] | Array) -> Array:
    """Gives a reward as a law on two neighbouring support points whose mean it is.

    r in (c_i, c_{i+1}] puts (c_{i+1} − r)/(c_{i+1} − c_i) on c_i and the rest on c_{i+1}. The map is linear in the law
    of r, so that laws of prefixes stay consistent: mixing laws over the next token commutes with it. Where two support
    points are equal a reward at them goes to the left one.

    Args:
      reward: any shape [...]; rewards beyond the support count at its ends.
      support: K >= 2 points, which do not decrease; the first two and the last two differ.

    Returns:
      [...,K], non-negative, of sum 1, in at least float32.
    """
    points = at_least_float32(jnp.asarray(support))
    r = jnp.clip(at_least_float32(reward), points[0], points[-1])
    above = jnp.clip(jnp.searchsorted(points, r, side="left"), 1, len(points) - 1)
    low, high = points[above - 1], points[above]
    share = (r - low) / jnp.where(high > low, high - low, 1)
    at = jnp.arange(len(points))
    right, left = at == above[..., None], at == above[..., None] - 1
    return jnp.where(right, share[..., None], 0) + jnp.where(left, 1 - share[..., None], 0)


def distribution(log_p: Array, *, target: Array, mask: Array) -> Scalar:
    """Gives the cross-entropy of laws, −Σ m·Σ_i target_i·log p_i / Σ m, in nats.

    Its minimiser over responses of the base is the law of the reward from each prefix under the base, learned without
    bootstrapping.

    Args:
      log_p: [b,T+1,K], log p of prefixes 0 (the prompt) to T (the response).
      target: [b,K], `two_hot` of each response's reward; or [b,T+1,K].
      mask: [b,T+1], the prefixes that count, the prompt's included.

    Returns:
      A scalar; 0 without a prefix that counts.

    Source: arXiv 2502.20548.
    """
    chex.assert_equal_shape([log_p[..., 0], mask])
    target = at_least_float32(target[:, None, :] if target.ndim == 2 else target)
    # Both where's before the product: what is masked out, or has no mass in the target, may be NaN or −inf.
    target = jnp.where(mask[..., None], target, 0)
    each = -(target * jnp.where(target == 0, 0, log_p)).sum(axis=-1)
    return each.sum() / jnp.maximum(mask.sum(), 1)


def grid_error(step: ArrayLike, *, beta: ArrayLike) -> Numbers:
    """Gives the largest error of a soft value that a grid makes.

    g(h) = log((e^h − 1)/h) − 1 + h/(e^h − 1), h = step/beta:
    0 <= V_soft^ − V_soft <= beta·g(step/beta) at every prefix, and |log(pi^(y)/pi*(y))| <= g for whole responses.

    Args:
      step: the width of a bin > 0, in units of reward.
      beta: the KL weight > 0, a shape that broadcasts.

    Returns:
      g in nats, at most h²/8.
    """
    h = at_least_float32(step) / at_least_float32(beta)
    small = h < 0.25
    safe = jnp.where(small, 1.0, h)
    exact = safe + jnp.log1p(-jnp.exp(-safe)) - jnp.log(safe) - 1 + safe * jnp.exp(-safe) / -jnp.expm1(-safe)
    near = jnp.where(small, h, 0)
    return jnp.where(small, near**2 / 8 - near**4 / 576 + near**6 / 25920 - near**8 / 1075200, exact)

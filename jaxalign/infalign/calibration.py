"""The calibrated reward: where a reward stands among those of base samples of the same prompt, in [0, 1].

C(x,y) = Pr_{z~pi_ref}(r(z) < r(y)) + ½·Pr(r(z) = r(y)). It depends on the order of the rewards alone, its mean under
the base is 1/2 for every prompt, and without ties it is uniform on [0, 1]. Source: InfAlign, arXiv 2412.19792, eq. 12.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32
from jaxalign._checks import check_positive, is_concrete
from jaxalign.shapes import Samples
from jaxalign.types import Array, ArrayLike


def calibrate(
    reward: ArrayLike,
    *,
    reference: ArrayLike,
    width: ArrayLike | None = None,
    smooth: bool = False,
    is_sorted: bool = False,
) -> Samples:
    """Gives the calibrated reward Ĉ = (1/K)·Σ_i (1[s_i < r] + ½·1[s_i = r]): the mean win against K base samples.

    Args:
      reward: [...,n]; n may be absent where reference is [K].
      reference: [...,K], K >= 2 rewards of base samples of the same prompt, in any order: it is sorted inside. What
        stands before the last axis is prompts, and broadcasts.
      width: None for the mid-rank step, by binary search: unbiased, ties count half, the gradient is zero. A width > 0,
        in units of reward, gives mean_i sigmoid((r − s_i)/width), differentiable in all three; it is
        `shaping.preference_as_reward` at 1 and tends to the step as it falls to 0.
      smooth: (K·Ĉ + ½)/(K + 1) in place of Ĉ, strictly inside (0, 1), so that log Ĉ is finite.
      is_sorted: the reference is a sorted table already.

    Returns:
      [...,n] in [0, 1]. A NaN in a reward gives NaN, one in the reference NaN for its prompt; so does, under jit, a
      table that is said to be sorted and is not.

    Raises:
      ValueError: K < 2; on concrete values also a NaN in the reference, width <= 0, a table that is said to be sorted
        and is not.

    Source: arXiv 2412.19792, eq. 12.
    """
    reward, reference = at_least_float32(reward), at_least_float32(reference)
    _check(reference, is_sorted=is_sorted)
    if width is None:
        found = _steps(reward, reference, is_sorted=is_sorted)
    else:
        check_positive("width", width)
        found = _sigmoids(reward, reference, at_least_float32(width))
    count = reference.shape[-1]
    result: Array = (found * count + 0.5) / (count + 1) if smooth else found
    return result


def calibration_table(reference: ArrayLike) -> Samples:
    """Gives the table that is kept per prompt for `calibrate(..., is_sorted=True)`.

    Args:
      reference: [...,K], K >= 2 rewards of base samples.

    Returns:
      [...,K], ascending along the last axis.

    Raises:
      ValueError: K < 2, or a NaN.
    """
    reference = at_least_float32(reference)
    _check(reference, is_sorted=False)
    return jnp.sort(reference, axis=-1)


def _check(reference: Array, *, is_sorted: bool) -> None:
    if reference.ndim == 0 or reference.shape[-1] < 2:
        raise ValueError(f"reference: expected at least 2 samples on the last axis, found shape {reference.shape}")
    if not is_concrete(reference):
        return
    values = np.asarray(reference)
    if np.isnan(values).any():
        raise ValueError("reference: expected numbers, found NaN")
    if is_sorted and (values[..., 1:] < values[..., :-1]).any():
        raise ValueError("reference: expected a table sorted along the last axis, found one that is not")


@functools.partial(jax.jit, static_argnames="is_sorted")
def _steps(reward: Array, reference: Array, *, is_sorted: bool) -> Array:
    count = reference.shape[-1]
    bad = jnp.isnan(reference).any(axis=-1)
    if is_sorted:
        bad |= (jnp.diff(reference, axis=-1) < 0).any(axis=-1)  # a binary search would find any place
    table = reference if is_sorted else jnp.sort(reference, axis=-1)
    dtype = jnp.result_type(reward, reference)

    def one(table: Array, reward: Array) -> Array:
        wins = jnp.searchsorted(table, reward, side="left") + jnp.searchsorted(table, reward, side="right")
        return wins.astype(dtype) / (2 * count)

    rank = one
    batch = jnp.broadcast_shapes(reference.shape[:-1], reward.shape[:-1])
    if reference.ndim > 1:
        table = jnp.broadcast_to(table, (*batch, count))
        reward = jnp.broadcast_to(reward, (*batch, reward.shape[-1]))
        bad = jnp.broadcast_to(bad, batch)[..., None]
        for _ in batch:
            rank = jax.vmap(rank)
    return jnp.where(jnp.isnan(reward) | bad, jnp.nan, rank(table, reward))


@jax.jit
def _sigmoids(reward: Array, reference: Array, width: Array) -> Array:
    reference = reference if reference.ndim == 1 else reference[..., None, :]
    return jax.nn.sigmoid((reward[..., None] - reference) / width).mean(axis=-1)

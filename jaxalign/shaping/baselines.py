"""What is done to rewards before a decoder sees them, all on one interface: f(utility [...,n], *, reference [...,K]) ->
reward [...,n], with the scores of K base samples of the same prompt as reference. Bind options with functools.partial.

The statistics could also come from the candidates themselves (the authors' token-level code does that): pass the
utility as its own reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32, centred, column, deviation, is_flat, middle, resolution
from jaxalign.shapes import Samples
from jaxalign.shaping.threshold import optimal_threshold, soft_threshold_reward, threshold_reward
from jaxalign.types import Array, ArrayLike

_SMALL = 1e-6  # of range and deviation: identical samples give no signal


def raw(utility: ArrayLike, *, reference: ArrayLike) -> Samples:
    """Gives the utility itself as the reward, r = u.

    Args:
      utility: [...,n].
      reference: not read.

    Returns:
      [...,n], at least float32.
    """
    return at_least_float32(utility)


def stackelberg(
    utility: ArrayLike,
    *,
    reference: ArrayLike,
    bound: ArrayLike,
    beta: ArrayLike,
    sharpness: float | None = None,
    range_factor: float | None = None,
    max_gain: float | None = None,
) -> Samples:
    """Gives the threshold reward, or its sigmoid form, with the threshold of the reference samples.

    Args:
      utility: [...,n].
      reference: [...,K], utilities of base samples of the same prompt.
      bound: B > 0, the largest reward, scalar or [...].
      beta: the follower's KL weight > 0, in units of reward per nat.
      sharpness: of the sigmoid form, in 1/units of u; None for the step.
      range_factor: the authors' data-dependent bound, B_x = min(bound, range_factor·range of the samples); None for
        none.
      max_gain: the authors' cap on the gain bound/beta in the threshold; None for none.

    Returns:
      [...,n] in [0, bound].

    Raises:
      ValueError: as `optimal_threshold` and `threshold_reward`.

    Source: arXiv 2602.02572.
    """
    reference, bound = at_least_float32(reference), at_least_float32(bound)
    if range_factor is not None:
        bound = jnp.minimum(bound, range_factor * (reference.max(axis=-1) - reference.min(axis=-1)))
        # A range of zero gives no signal; the bound must stay positive for the functions below.
        bound = jnp.maximum(bound, jnp.finfo(bound.dtype).tiny)
    threshold = optimal_threshold(reference, gain=bound / beta, max_gain=max_gain)
    if sharpness is None:
        return threshold_reward(utility, threshold=threshold, bound=bound)
    return soft_threshold_reward(utility, threshold=threshold, bound=bound, sharpness=sharpness)


def minmax(utility: ArrayLike, *, reference: ArrayLike, bound: ArrayLike, range_factor: float | None = None) -> Samples:
    """Gives r = B·(u − min)/max(range, 1e-6), min and range of the reference.

    Args:
      utility: [...,n].
      reference: [...,K], utilities of base samples of the same prompt.
      bound: B, scalar or [...].
      range_factor: B = min(bound, range_factor·range) in place of the bound: where the bound does not bind that is
        range_factor·(u − min), the raw reward again. None for the bound itself.

    Returns:
      [...,n]; 0 where the reference and u agree up to rounding.
    """
    utility, reference = at_least_float32(utility), at_least_float32(reference)
    low = reference.min(axis=-1, keepdims=True)
    spread = reference.max(axis=-1, keepdims=True) - low
    bound = column(at_least_float32(bound))
    bound = bound if range_factor is None else jnp.minimum(bound, range_factor * spread)
    above = _without_rounding(utility - low, reference)
    return bound * above / jnp.maximum(spread, _SMALL)


def meanstd(utility: ArrayLike, *, reference: ArrayLike) -> Samples:
    """Gives r = (u − mean)/max(deviation, 1e-6), mean and standard deviation of the reference.

    Args:
      utility: [...,n].
      reference: [...,K], utilities of base samples of the same prompt.

    Returns:
      [...,n]; 0 where the reference and u agree up to rounding, 4 units in the last place of the largest |reference|.
    """
    utility, reference = at_least_float32(utility), at_least_float32(reference)
    offset = middle(reference)
    spread = jnp.where(is_flat(reference), _SMALL, deviation(centred(reference), ddof=0))
    above = _without_rounding(utility - offset - (reference - offset).mean(axis=-1, keepdims=True), reference)
    return above / jnp.maximum(spread, _SMALL)


def _without_rounding(difference: Array, reference: Array) -> Array:
    """Differences [...,n] to a statistic of the reference [...,K], 0 where the samples are alike up to rounding and the
    difference is no more: divided by a deviation of that size it would be a signal."""
    return jnp.where(is_flat(reference) & (jnp.abs(difference) <= resolution(reference)), 0, difference)


def cap(utility: ArrayLike, *, reference: ArrayLike, bound: ArrayLike) -> Samples:
    """Gives r = clip(u − min, 0, bound), min of the reference.

    Args:
      utility: [...,n].
      reference: [...,K], utilities of base samples of the same prompt.
      bound: the largest reward, scalar or [...], in units of u.

    Returns:
      [...,n] in [0, bound].
    """
    low = at_least_float32(reference).min(axis=-1, keepdims=True)
    return jnp.clip(at_least_float32(utility) - low, 0, column(at_least_float32(bound)))


def mean_sigmoid(utility: ArrayLike, *, reference: ArrayLike, bound: ArrayLike, sharpness: float) -> Samples:
    """Gives r = bound·sigmoid(sharpness·(u − mean)), mean of the reference.

    It is the soft threshold with its centre at the mean, where the optimal one lies above.

    Args:
      utility: [...,n].
      reference: [...,K], utilities of base samples of the same prompt.
      bound: the largest reward > 0, scalar or [...].
      sharpness: in 1/units of u.

    Returns:
      [...,n] in [0, bound].

    Raises:
      ValueError: bound <= 0.
    """
    reference = at_least_float32(reference)
    offset = middle(reference)
    mean = (offset + (reference - offset).mean(axis=-1, keepdims=True))[..., 0]
    return soft_threshold_reward(utility, threshold=mean, bound=bound, sharpness=sharpness)


def log_sigmoid(utility: ArrayLike, *, reference: ArrayLike, quantile: float = 0.85) -> Samples:
    """Gives r = log sigmoid(u − quantile of the reference): negative, bounded above by 0, not below.

    Args:
      utility: [...,n].
      reference: [...,K], utilities of base samples of the same prompt.
      quantile: in [0, 1].

    Returns:
      [...,n].

    Source: Wang et al., 2024.
    """
    centre = jnp.quantile(at_least_float32(reference), quantile, axis=-1, keepdims=True)
    return jax.nn.log_sigmoid(at_least_float32(utility) - centre)


def preference_as_reward(utility: ArrayLike, *, reference: ArrayLike) -> Samples:
    """Gives PAR, r = mean_j sigmoid(u − u_j): the Bradley-Terry win rate over the reference.

    Args:
      utility: [...,n].
      reference: [...,K], utilities u_j of base samples of the same prompt.

    Returns:
      [...,n] in (0, 1).

    Source: Fu et al., 2025.
    """
    utility, reference = at_least_float32(utility), at_least_float32(reference)
    return jax.nn.sigmoid(utility[..., :, None] - reference[..., None, :]).mean(axis=-1)

"""A shaping function that is learned: monotone in the utility, and aware of the prompt by its samples' statistics."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32, is_flat, middle
from jaxalign.shapes import Numbers, Samples
from jaxalign.types import Array, ArrayLike

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def statistics(reference: ArrayLike) -> tuple[Numbers, Numbers, Array]:
    """Gives what a shaping function knows of a prompt: statistics of the utilities of its base samples.

    Args:
      reference: [...,K], utilities of base samples.

    Returns:
      (mean [...], scale [...], features [...,6]). The scale is the standard deviation, 1 where it is rounding; the
      features are standardised quantiles, so that u -> a·u + c changes none of them.
    """
    reference = at_least_float32(reference)
    offset = middle(reference)
    inner = reference - offset
    mean = inner.mean(axis=-1)
    # A deviation that is rounding would turn it into features of size 1.
    scale = jnp.sqrt(jnp.where(is_flat(reference)[..., 0], 1, inner.var(axis=-1)))
    found = jnp.quantile(inner, jnp.asarray(QUANTILES, reference.dtype), axis=-1)
    return offset[..., 0] + mean, scale, jnp.moveaxis((found - mean) / scale, 0, -1)


class MonotoneShaping(nn.Module):
    """r(u, x) = bound·sigmoid(Σ_k a_k·tanh(b_k·(z − c_k)) + d), z = (u − mean)/scale, a and b > 0: non-decreasing in u.

    a, b, c, d are functions of the prompt's statistics by a small network. Trained through the follower's closed form
    on samples of many prompts: the loss is −leader_utility of the rewards.
    """

    bound: float
    """B, the largest reward."""
    units: int = 4
    """Steps k of the sum."""
    width: int = 32
    """Of the network's hidden layer."""

    @nn.compact
    def __call__(self, utility: Samples, *, reference: Samples) -> Samples:
        """Gives the reward of responses of one prompt each.

        Args:
          utility: [...,n].
          reference: [...,K], utilities of base samples of the same prompt.

        Returns:
          [...,n] in [0, bound].
        """
        mean, scale, features = statistics(reference)
        hidden = nn.tanh(nn.Dense(self.width)(features))
        shape = nn.Dense(3 * self.units + 1, kernel_init=nn.initializers.normal(0.1))(hidden)
        height, slope, centre, offset = jnp.split(shape, [self.units, 2 * self.units, 3 * self.units], axis=-1)
        # Centres start spread over the upper half, where thresholds lie.
        spread = jnp.linspace(-0.5, 2.0, self.units)
        z = ((at_least_float32(utility) - mean[..., None]) / scale[..., None])[..., None]
        steps = nn.tanh(nn.softplus(slope + 2.0)[..., None, :] * (z - (centre + spread)[..., None, :]))
        return self.bound * jax.nn.sigmoid((nn.softplus(height + 1.0)[..., None, :] * steps).sum(axis=-1) + offset)

"""What the losses share."""

from __future__ import annotations

import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.types import Array

MAX_EXPONENT = 20.0  # of the linex loss, and of probability ratios


def masked(x: Array, mask: Array) -> Array:
    """x, at least float32, with 0 where the mask is False: whatever stood there leaves value and gradient finite."""
    return jnp.where(mask, at_least_float32(x), 0)

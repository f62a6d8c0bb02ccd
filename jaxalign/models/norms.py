"""Norms of the residual stream, of queries and of keys."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.models.block import Block
from jaxalign.types import Array


class RMSNorm(nn.Module):
    """x / sqrt(mean x² + eps) · (offset + scale), in at least float32."""

    eps: float
    param_dtype: Any
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],), self.param_dtype)
        wide = at_least_float32(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        found: Array
        if self.offset:  # the sum in float32: bfloat16 has few numbers around 1
            found = (wide * (self.offset + at_least_float32(scale))).astype(x.dtype)
        else:
            found = wide.astype(x.dtype) * scale
        return found


class LayerNorm(nn.Module):
    """(x − mean x) / sqrt(var x + eps) · scale + bias, in at least float32."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        wide = at_least_float32(x)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * at_least_float32(scale) + at_least_float32(bias)).astype(x.dtype)


def norm(block: Block, eps: float, dtype: Any) -> RMSNorm | LayerNorm:
    """The norm that a block has."""
    return LayerNorm(eps, dtype) if block.norm == "layer" else RMSNorm(eps, dtype, block.norm_offset)

"""Rotary positions as functions of arrays: the frequencies of each kind, and the rotation."""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxalign.models.block import Rope
from jaxalign.types import Array


def inverse_frequencies(rope: Rope, head_dim: int, total: Array | None = None) -> Array:
    """The frequencies of the numbers that are rotated, as transformers' `rope_type` of each kind has them.

    theta^(−2i/n) of n rotated numbers; "linear" divides it by the factor; "llama3" divides the long wavelengths, keeps
    the short ones and blends between; "yarn" blends by dimension; "dynamic" and "longrope" read how long a text is.

    Args:
      rope: the kind and its numbers.
      head_dim: hd.
      total: [...] tokens of each text, of kinds that read it.

    Returns:
      [n/2], or [...,n/2] of kinds that read the length.
    """
    width = rope.rotated(head_dim)
    exponent = jnp.arange(0, width, 2) / width
    if rope.kind == "dynamic":
        ratio = jnp.maximum(_length(rope, total), rope.original_max_length) / rope.original_max_length
        theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (width / (width - 2))
        return 1.0 / theta[..., None] ** exponent
    frequency = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * jnp.pi / frequency
        ratio = rope.original_max_length / wavelength
        smooth = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return frequency * (jnp.clip(smooth, 0, 1) * (1 - 1 / rope.factor) + 1 / rope.factor)
    if rope.kind == "yarn":
        low, high = _yarn_range(rope, width)
        scaled = jnp.clip((jnp.arange(width // 2) - low) / (high - low), 0, 1)
        return frequency / rope.factor * scaled + frequency * (1 - scaled)
    if rope.kind == "longrope":
        long = _length(rope, total)[..., None] > rope.original_max_length
        return frequency / jnp.where(long, jnp.asarray(rope.long_factors), jnp.asarray(rope.short_factors))
    return frequency


def _length(rope: Rope, total: Array | None) -> Array:
    if total is None:
        raise ValueError(f"total: expected the length of each text for rope kind {rope.kind!r}, found None")
    return total


def _yarn_range(rope: Rope, width: int) -> tuple[float, float]:
    """The first and the last number of a head between which scaling sets in (arXiv 2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:
        return width * math.log(rope.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return low, high + 0.001 if low == high else high


def rotate(x: Array, position: Array, rope: Rope, *, limit: int | None = None, total: Array | None = None) -> Array:
    """Rotary embedding of x [B,L,H,hd] at position [B,L]; halves rotated together; angles in at least float32.

    limit: no position reaches it. Cosines are then looked up in a table; the compiler else takes them again for each
    head, in each of its readers, which is a twentieth of a training step.
    total: tokens of each text, [B,L] or [B,1]; only kinds whose frequencies depend on it read it, and those have no
    table."""
    head_dim = x.shape[-1]
    if rope.reads_length:
        angle = (position[..., None] * inverse_frequencies(rope, head_dim, total))[..., None, :]
        limit = None
    else:
        at = position if limit is None else jnp.arange(limit)
        angle = at[..., None, None] * inverse_frequencies(rope, head_dim)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    if limit is not None:
        cos, sin = cos[position], sin[position]
    wide = x.astype(jnp.promote_types(x.dtype, angle.dtype))
    width = rope.rotated(head_dim)
    rest = [wide[..., width:]] if width < head_dim else []
    left, right = jnp.split(wide[..., :width] if rest else wide, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, *rest], axis=-1).astype(x.dtype)

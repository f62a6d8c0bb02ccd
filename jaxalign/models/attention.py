"""Attention as functions of arrays: scores, and segments that continue a cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import NEGATIVE
from jaxalign.models.cache import KeyValue
from jaxalign.types import Array


def wide_einsum(spec: str, left: Array, right: Array) -> Array:
    """An einsum with sums and result in at least float32; for bfloat16 also 2-4x faster on a CPU than a rounded one."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap·tanh(x/cap), or x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class PackedSegments(NamedTuple):
    """Where the tokens of segments [B,M,S] stand, and in which order they are packed.

    Work that is done token by token needs neither rows nor columns: it runs on P packed tokens [1,P,...].
    """

    mask: Array
    """[B,M,S]: which tokens are real."""
    position: Array
    """[B,M,S]: the position of each token in its text."""
    source: Array | None
    """[P]: the place in [B·M·S] of each packed token; None: all places, in order."""
    target: Array | None
    """[B·M·S]: the packed number of each place, arbitrary where there is no real token; None as for source."""

    @property
    def total(self) -> Array:
        """[B,M,S]: how many tokens the text of each has, its segment included."""
        return jnp.broadcast_to(self.position[..., -1:] + 1, self.position.shape)

    def gather(self, x: Array) -> Array:
        """Packs x [B,M,S,...] into [1,P,...]."""
        flat = x.reshape(-1, *x.shape[3:])
        return (flat if self.source is None else jnp.take(flat, self.source, axis=0))[None]

    def scatter(self, x: Array) -> Array:
        """Unpacks x [1,P,...] into [B,M,S,...], 0 where there is no real token."""
        flat = x[0] if self.target is None else jnp.take(x[0], self.target, axis=0)
        return zero_invalid(flat.reshape(*self.mask.shape, *x.shape[2:]), self.mask)

    def pick(self, x: Array, at: Array) -> Array:
        """The entries of x [1,P,...] at place `at` [B,M] of each segment: [1,B·M,...], 0 where no real token stands."""
        return zero_invalid(jnp.take(x[0], self.packed_number(at)[0], axis=0), self.valid_at(at).reshape(-1))[None]

    def valid_at(self, at: Array) -> Array:
        """[B,M,1]: whether a real token stands at place `at` [B,M] of each segment."""
        return jnp.take_along_axis(self.mask, at[..., None], axis=2)

    def packed_number(self, at: Array) -> Array:
        """The packed numbers [1,B·M] of places `at` [B,M]; another token's where no real token stands."""
        place = jnp.arange(at.size) * self.mask.shape[2] + at.reshape(-1)
        return (place if self.target is None else self.target[place])[None]


def zero_invalid(x: Array, valid: Array) -> Array:
    """x [...,*] where valid [...] is True, else 0.

    A packed pass gives another row's numbers where there is no real token. Neither its NaN may come through here, nor
    the NaN of this row's gradient go there."""
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - valid.ndim)), x, 0)


def pack_segments(mask: Array, length: Array, packed: int | None) -> PackedSegments:
    """The places of segments with mask [B,M,S] that follow length [B] tokens.

    Args:
      mask: real tokens.
      length: tokens of each row before its segments.
      packed: P, at least as many as there are real tokens; None: B·M·S.
    """
    position = length[:, None, None] + jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    if packed is None or packed >= mask.size:
        return PackedSegments(mask, position, None, None)
    flat = mask.reshape(-1)
    source = jnp.nonzero(flat, size=packed, fill_value=0)[0]
    return PackedSegments(mask, position, source, jnp.clip(jnp.cumsum(flat) - 1, 0, packed - 1))


def attend(
    q: Array,
    k: Array,
    v: Array,
    cache: KeyValue,
    length: Array,
    segments: PackedSegments,
    window: int | None,
    at: Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
) -> Array:
    """What segments read: q [B,M,S,H,hd], k, v [B,M,S,Hkv,hd] -> [B,M,S,H·hd]. With at [B,M], one query of each segment
    alone: q [B,M,1,H,hd] -> [B,M,1,H·hd].

    A token attends to the first length [B] slots of its row's cache, which all M segments share, and to the tokens of
    its own segment up to itself; both no further back than `window`. Scores are multiplied by `scale` and capped."""
    batch, count, width, _, head_dim = q.shape
    position, order = segments.position, jnp.arange(width)
    if at is not None:
        position, order = jnp.take_along_axis(position, at[..., None], axis=2), at[..., None]
    heads, slots = cache.k.shape[1:3]
    q = q.reshape(batch, count, width, heads, -1, head_dim).transpose(0, 3, 1, 2, 4, 5)  # [B,Hkv,M,S,G,hd]
    flat, inside = q.reshape(batch, heads, -1, head_dim), (*q.shape[:-1], slots)
    before = wide_einsum("bhqd,bhcd->bhqc", flat, cache.k).reshape(inside)
    own = wide_einsum("bhmsgd,bmthd->bhmsgt", q, k)
    slot = jnp.arange(slots)
    seen = jnp.broadcast_to((slot < length[:, None])[:, None, None], (batch, count, width, slots))
    allowed = segments.mask[:, :, None] & (order[..., None] >= jnp.arange(k.shape[2]))
    if window is not None:
        seen &= slot > position[..., None] - window
        allowed &= position[..., None] - segments.position[:, :, None] < window
    score = soft_cap(jnp.concatenate([before, own], axis=-1) * scale, cap)
    reads = jnp.concatenate([seen, allowed], axis=-1)[:, None, :, :, None]
    weight = jax.nn.softmax(jnp.where(reads, score, NEGATIVE), axis=-1).astype(v.dtype)
    weight, weight_own = jnp.split(weight, [slots], axis=-1)
    mixed = jnp.einsum("bhqc,bhcd->bhqd", weight.reshape(batch, heads, -1, slots), cache.v).reshape(q.shape)
    mixed += jnp.einsum("bhmsgt,bmthd->bhmsgd", weight_own, v)
    return mixed.transpose(0, 2, 3, 1, 4, 5).reshape(batch, count, width, -1)

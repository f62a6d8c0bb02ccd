"""Attention as functions of arrays: rotary positions, writes to a cache, and segments that continue a cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import NEGATIVE
from jaxalign.models.config import Rope
from jaxalign.types import Array


class KeyValue(NamedTuple):
    """k, v [B,Hkv,S,hd]: the cache of one layer, or (S = K) the entries of K candidates; [B,M,Hkv,S,hd]: the entries of
    M segments."""

    k: Array
    v: Array


def inverse_frequencies(rope: Rope, head_dim: int) -> Array:
    """theta^(−2i/hd), scaled: linear divides by the factor; llama3 divides the long wavelengths by it, keeps the short
    ones and blends between (transformers' `rope_type` of these names)."""
    frequency = 1.0 / rope.theta ** (jnp.arange(0, head_dim, 2) / head_dim)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * jnp.pi / frequency
        ratio = rope.original_max_length / wavelength
        smooth = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return frequency * (jnp.clip(smooth, 0, 1) * (1 - 1 / rope.factor) + 1 / rope.factor)
    return frequency


def rotate(x: Array, position: Array, rope: Rope, *, limit: int | None = None) -> Array:
    """Rotary embedding of x [B,L,H,hd] at position [B,L]; halves rotated together; angles in at least float32.

    limit: no position reaches it. Cosines are then looked up in a table; the compiler else takes them again for each
    head, in each of its readers, which is a twentieth of a training step."""
    at = position if limit is None else jnp.arange(limit)
    angle = at[..., None, None] * inverse_frequencies(rope, x.shape[-1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if limit is not None:
        cos, sin = cos[position], sin[position]
    left, right = jnp.split(x.astype(jnp.promote_types(x.dtype, angle.dtype)), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def wide_einsum(spec: str, left: Array, right: Array) -> Array:
    """An einsum with sums and result in at least float32; for bfloat16 also 2-4x faster on a CPU than a rounded one."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def write_slot(cache: Array, new: Array, slot: Array) -> Array:
    """cache [B,H,S,hd] with new [B,H,hd] at slot [B] of each row; a slot past the end is dropped.

    One update per row AND head: a single update (batch 1, all heads at once) becomes a dynamic-update-slice, which XLA
    fuses twice and pays for with four copies of the cache a step (3x the time at batch 1 with 2048 slots).
    """
    row, head = jnp.arange(cache.shape[0])[:, None], jnp.arange(cache.shape[1])
    return cache.at[row, head, slot[:, None]].set(new, mode="drop", unique_indices=True, indices_are_sorted=True)


def write_segment(cache: Array, new: Array, slot: Array) -> Array:
    """cache [B,H,S,hd] with new [B,H,m,hd] at slots [B,m] of each row; slots past the end are dropped."""
    row, head = jnp.arange(cache.shape[0])[:, None, None], jnp.arange(cache.shape[1])[:, None]
    return cache.at[row, head, slot[:, None]].set(new, mode="drop")


class Places(NamedTuple):
    """Where the tokens of segments [B,M,S] stand. mask [B,M,S]: which are real; position [B,M,S] of each in its text.

    What is done token by token needs neither rows nor columns, and runs on P packed tokens: take [P] their places in
    [B·M·S], put [B·M·S] the packed number of each place (anything where there is no token). None: all, in order."""

    mask: Array
    position: Array
    take: Array | None
    put: Array | None

    def gather(self, x: Array) -> Array:
        """[B,M,S,...] -> [1,P,...]."""
        flat = x.reshape(-1, *x.shape[3:])
        return (flat if self.take is None else jnp.take(flat, self.take, axis=0))[None]

    def pick(self, x: Array, at: Array) -> Array:
        """[1,P,...] -> [1,B·M,...], what stands at place at [B,M] of each segment; 0 where no token does."""
        return blank(jnp.take(x[0], self.packed(at)[0], axis=0), self.there(at).reshape(-1))[None]

    def there(self, at: Array) -> Array:
        """[B,M,1]: whether a token stands at place at [B,M]."""
        return jnp.take_along_axis(self.mask, at[..., None], axis=2)

    def packed(self, at: Array) -> Array:
        """The packed numbers [1,B·M] of places at [B,M]; another token's where none stands."""
        place = jnp.arange(at.size) * self.mask.shape[2] + at.reshape(-1)
        return (place if self.put is None else self.put[place])[None]

    def spread(self, x: Array) -> Array:
        """[1,P,...] -> [B,M,S,...]; 0 where there is no token."""
        flat = x[0] if self.put is None else jnp.take(x[0], self.put, axis=0)
        return blank(flat.reshape(*self.mask.shape, *x.shape[2:]), self.mask)


def blank(x: Array, there: Array) -> Array:
    """x [...,*] where there [...], else 0. What a packed pass gives for no token is another row's: not even its NaN may
    come through, nor that of one's own gradient go there."""
    return jnp.where(there.reshape(*there.shape, *(1,) * (x.ndim - there.ndim)), x, 0)


def places(mask: Array, length: Array, packed: int | None) -> Places:
    """Of segments with mask [B,M,S] after length [B] tokens. packed: P, at least as many as there are real tokens;
    None: B·M·S."""
    position = length[:, None, None] + jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    if packed is None or packed >= mask.size:
        return Places(mask, position, None, None)
    flat = mask.reshape(-1)
    take = jnp.nonzero(flat, size=packed, fill_value=0)[0]
    return Places(mask, position, take, jnp.clip(jnp.cumsum(flat) - 1, 0, packed - 1))


def attend(
    q: Array,
    k: Array,
    v: Array,
    cache: KeyValue,
    length: Array,
    places: Places,
    window: int | None,
    at: Array | None = None,
) -> Array:
    """What segments read: q [B,M,S,H,hd], k, v [B,M,S,Hkv,hd] -> [B,M,S,H·hd]. With at [B,M], one query of each segment
    alone: q [B,M,1,H,hd] -> [B,M,1,H·hd].

    A token attends to the first length [B] slots of its row's cache, which all M segments share, and to the tokens of
    its own segment up to itself; both no further back than `window`."""
    batch, count, width, _, head_dim = q.shape
    position, order = places.position, jnp.arange(width)
    if at is not None:
        position, order = jnp.take_along_axis(position, at[..., None], axis=2), at[..., None]
    heads, slots = cache.k.shape[1:3]
    q = q.reshape(batch, count, width, heads, -1, head_dim).transpose(0, 3, 1, 2, 4, 5)  # [B,Hkv,M,S,G,hd]
    flat, inside = q.reshape(batch, heads, -1, head_dim), (*q.shape[:-1], slots)
    before = wide_einsum("bhqd,bhcd->bhqc", flat, cache.k).reshape(inside)
    own = wide_einsum("bhmsgd,bmthd->bhmsgt", q, k)
    slot = jnp.arange(slots)
    seen = jnp.broadcast_to((slot < length[:, None])[:, None, None], (batch, count, width, slots))
    allowed = places.mask[:, :, None] & (order[..., None] >= jnp.arange(k.shape[2]))
    if window is not None:
        seen &= slot > position[..., None] - window
        allowed &= position[..., None] - places.position[:, :, None] < window
    score = jnp.concatenate([before, own], axis=-1) * head_dim**-0.5
    reads = jnp.concatenate([seen, allowed], axis=-1)[:, None, :, :, None]
    weight = jax.nn.softmax(jnp.where(reads, score, NEGATIVE), axis=-1).astype(v.dtype)
    weight, weight_own = jnp.split(weight, [slots], axis=-1)
    mixed = jnp.einsum("bhqc,bhcd->bhqd", weight.reshape(batch, heads, -1, slots), cache.v).reshape(q.shape)
    mixed += jnp.einsum("bhmsgt,bmthd->bhmsgd", weight_own, v)
    return mixed.transpose(0, 2, 3, 1, 4, 5).reshape(batch, count, width, -1)

"""The cache of keys and values, and what is written to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import dropped
from jaxalign.types import Array


class KeyValue(NamedTuple):
    """Keys and values of one layer: its cache [B,Hkv,S,hd], the entries of K candidates [B,Hkv,K,hd], or the entries of
    M segments [B,M,Hkv,S,hd]."""

    k: Array
    """The keys, rotated."""
    v: Array
    """The values."""


class Cache(NamedTuple):
    """What a model keeps of the texts so far."""

    layers: tuple[KeyValue, ...]
    """One KeyValue [B,Hkv,S,hd] per layer."""
    length: Array
    """[B]: slots filled, which is the next token's position."""

    @property
    def capacity(self) -> int:
        """S: the slots of each row."""
        return self.layers[0].k.shape[2]

    def shortened(self, length: Array) -> Cache:
        """Gives what the cache was when its rows were shorter: later slots are not read, and written again.

        Args:
          length: [B], tokens of each row.

        Returns:
          The cache, of the same slots.
        """
        return Cache(self.layers, length)


def filled(entries: Sequence[KeyValue], length: Array, capacity: int) -> Cache:
    """A Cache with `capacity` slots a row whose first ones hold the entries [B,Hkv,P,hd] of a prompt.

    length [B]: how many of the P each row has filled."""
    room = ((0, 0), (0, 0), (0, capacity - entries[0].k.shape[2]), (0, 0))
    return Cache(tuple(KeyValue(jnp.pad(e.k, room), jnp.pad(e.v, room)) for e in entries), length)


def next_slot(cache: Cache, moves: Array) -> Array:
    """The slot [B] that each row writes: its length, or past the end (dropped) where moves [B] is False."""
    return jnp.where(moves, cache.length, cache.capacity)


def commit(cache: Cache, entries: tuple[KeyValue, ...], choice: Array) -> Cache:
    """The cache with candidate choice [B] of each row in its next slot.

    entries: of K candidates, per layer [B,Hkv,K,hd]. Choice -1 writes nowhere and keeps the length."""
    rows, pick = jnp.arange(choice.shape[0]), jnp.maximum(choice, 0)
    slot = next_slot(cache, choice >= 0)
    layers = jax.tree.map(lambda old, new: write_slot(old, new[rows, :, pick], slot), cache.layers, entries)
    return Cache(layers, cache.length + (choice >= 0))


def append(cache: Cache, entries: tuple[KeyValue, ...], mask: Array, choice: Array) -> Cache:
    """The cache with the real tokens of segment choice [B] of each row in its next slots.

    entries: of M segments, per layer [B,M,Hkv,S,hd]; mask [B,M,S]: real tokens. Choice -1 writes nowhere and keeps the
    length."""
    rows, pick = jnp.arange(choice.shape[0]), jnp.maximum(choice, 0)
    real = mask[rows, pick] & (choice >= 0)[:, None]
    slot = jnp.where(real, cache.length[:, None] + jnp.cumsum(real, axis=1) - 1, cache.capacity)
    layers = jax.tree.map(lambda old, new: write_segment(old, new[rows, pick], slot), cache.layers, entries)
    return Cache(layers, cache.length + real.sum(axis=1, dtype=cache.length.dtype))


def write_slot(cache: Array, new: Array, slot: Array) -> Array:
    """cache [B,H,S,hd] with new [B,H,hd] at slot [B] of each row; a slot past the end is dropped.

    One update per row AND head: a single update (batch 1, all heads at once) becomes a dynamic-update-slice, which XLA
    fuses twice and pays for with four copies of the cache a step (3x the time at batch 1 with 2048 slots).
    """
    row, head, room = jnp.arange(cache.shape[0])[:, None], jnp.arange(cache.shape[1]), cache.shape[2]
    slot, kept = slot[:, None], dropped(row, slot[:, None] < room, len(row))
    return cache.at[kept, head, slot].set(new, mode="drop", unique_indices=True, indices_are_sorted=kept is row)


def write_segment(cache: Array, new: Array, slot: Array) -> Array:
    """cache [B,H,S,hd] with new [B,H,m,hd] at slots [B,m] of each row; slots past the end are dropped."""
    row, head = jnp.arange(cache.shape[0])[:, None, None], jnp.arange(cache.shape[1])[:, None]
    slot = slot[:, None]
    return cache.at[dropped(row, slot < cache.shape[2], len(row)), head, slot].set(new, mode="drop")

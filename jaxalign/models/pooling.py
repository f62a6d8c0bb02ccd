"""Where a reward head reads a text: at the token at which transformers reads a sequence classifier, or the mean of the
tokens' hidden states."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxalign import mdp
from jaxalign._arrays import at_least_float32
from jaxalign.types import Array


def last_read_index(tokens: Array, mask: Array, pad_id: int | None) -> Array:
    """Gives the index of the last real token that is not the model's pad id, at which a reward model is read.

    Args:
      tokens: [...,L] ids.
      mask: [...,L], True on real tokens.
      pad_id: the id that is passed over; None for none.

    Returns:
      [...] int32; −1 where there is none.
    """
    mask = mask.astype(bool)
    return mdp.last_index(mask if pad_id is None else mask & (tokens != pad_id))


def read_index(tokens: Array, mask: Array, pad_id: int | None) -> Array:
    """The index at which a sequence classifier is read (`GenericForSequenceClassification.forward` of transformers).

    Args:
      tokens: [...,L] ids.
      mask: [...,L], True on real tokens, under any padding; what stands elsewhere is not looked at.
      pad_id: the model's pad id, which is passed over where it stands as a real token too; None: nothing is.

    Returns:
      [...]: of the last real token that is not pad_id; the first real token where all are pad_id; -1 without one.
    """
    last = last_read_index(tokens, mask, pad_id)
    if pad_id is None:
        return last
    mask = mask.astype(bool)
    first = jnp.where(mask.any(axis=-1), jnp.argmax(mask, axis=-1).astype(last.dtype), -1)
    return jnp.where(last >= 0, last, first)


class Pooled(NamedTuple):
    """The hidden states of a text's tokens, added up: what a head that pools by the mean keeps of a prefix."""

    total: Array
    """[...,D], the sum in at least float32."""
    number: Array
    """[...] float, how many tokens are in it."""

    @property
    def mean(self) -> Array:
        """[...,D], the mean; 0 without a token."""
        return self.total / jnp.maximum(self.number, 1)[..., None]

    def plus(self, other: Pooled) -> Pooled:
        """Adds the states of another text.

        Args:
          other: over [...], broadcast with this one's.

        Returns:
          The states of both.
        """
        return Pooled(self.total + other.total, self.number + other.number)


def pooled(hidden: Array, tokens: Array, mask: Array, pad_id: int | None) -> Pooled:
    """Adds up the hidden states of the real tokens that are not the model's pad id.

    Args:
      hidden: [...,L,D], undefined at padding.
      tokens: [...,L] ids.
      mask: [...,L], True on real tokens.
      pad_id: the id that is passed over; None for none.

    Returns:
      A Pooled over [...].
    """
    read = mask.astype(bool) if pad_id is None else mask.astype(bool) & (tokens != pad_id)
    states = jnp.where(read[..., None], at_least_float32(hidden), 0)
    return Pooled(states.sum(axis=-2), read.sum(axis=-1).astype(states.dtype))

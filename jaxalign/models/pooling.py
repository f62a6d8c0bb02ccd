"""At which token a sequence classifier is read, as transformers reads it."""

from __future__ import annotations

import jax.numpy as jnp

from jaxalign import mdp
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

"""Token lists of any length as left-padded batches of few shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.shapes import PromptIndex
from jaxalign.types import Prompts, TokenBatch

__all__ = [
    "any_prompts",
    "bucket",
    "prompt_batch",
    "prompt_index",
    "prompts_at",
    "prompts_for",
]


def bucket(n: int, *, smallest: int = 8) -> int:
    """Gives the bucket of a length or a batch size: `smallest`·2^i, or half-way between two of them.

    8, 12, 16, 24, 32, 48, 64, …: at most a third of a bucket is padding, and lengths up to 4096 need 19 traces.

    Args:
      n: >= 1.
      smallest: the first bucket.

    Returns:
      The smallest bucket that holds n.

    Raises:
      ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, found {n}")
    size = smallest
    while size < n:
        if size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size


def prompt_batch(
    sequences: Sequence[Sequence[int]],
    *,
    index: Sequence[int] | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    pad_id: int = 0,
) -> TokenBatch:
    """Left-padded prompts [B,P]. Every function here takes shapes as they come, and each new one is a new trace: this
    puts P in a `bucket` (or at `length`).

    Args:
      sequences: token ids, one list per prompt.
      index: each prompt's row in its set; 0..B-1 when None.
      batch_size: fills the batch up by repeating the last prompt; the caller drops the rows beyond len(sequences).
      length: P; a bucket of the longest prompt when None.
      pad_id: any id; masks never depend on it.

    Returns:
      A TokenBatch [B,P].

    Raises:
      ValueError: no sequences, an empty one (its row is named), more than batch_size, or one longer than `length`.
    """
    if not sequences:
        raise ValueError("sequences: expected at least one prompt, found none")
    empty = [row for row, sequence in enumerate(sequences) if len(sequence) == 0]
    if empty:
        raise ValueError(f"sequences: expected at least one token in each prompt, found none in rows {empty}")
    longest = max(len(sequence) for sequence in sequences)
    width = bucket(longest) if length is None else length
    if longest > width:
        raise ValueError(f"length: expected at least the longest prompt's {longest} tokens, found {width}")
    rows = list(range(len(sequences))) if index is None else list(index)
    if len(rows) != len(sequences):
        raise ValueError(f"index: expected {len(sequences)} rows, found {len(rows)}")
    size = len(sequences) if batch_size is None else batch_size
    if size < len(sequences):
        raise ValueError(f"batch_size: expected at least {len(sequences)}, found {size}")
    tokens = np.full((size, width), pad_id, np.int32)
    mask = np.zeros((size, width), bool)
    for b in range(size):
        sequence = sequences[min(b, len(sequences) - 1)]
        tokens[b, width - len(sequence) :] = sequence
        mask[b, width - len(sequence) :] = True
    filled = rows + [rows[-1]] * (size - len(rows))
    return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(filled, jnp.int32))


def prompts_for(prompts: Prompts, name: str) -> Prompts:
    """Gives the prompts of one model (law 4): a TokenBatch serves all, a dict is looked up.

    Args:
      prompts: a TokenBatch, or a dict that mirrors params.
      name: the model's entry.

    Returns:
      The entry, or the TokenBatch.

    Raises:
      ValueError: a dict without that entry.
    """
    if isinstance(prompts, TokenBatch):
        return prompts
    if isinstance(prompts, tuple) and hasattr(prompts, "_asdict"):  # the NamedTuple of the params, filled with prompts
        prompts = prompts._asdict()
    if not isinstance(prompts, Mapping):
        raise ValueError(
            f"prompts: expected a TokenBatch or a dict that mirrors params, found {type(prompts).__name__}"
        )
    if name not in prompts:
        raise ValueError(f"prompts: expected an entry {name!r} to mirror params, found {sorted(prompts)}")
    return prompts[name]


def prompts_at(prompts: Prompts, i: int) -> Prompts:
    """Gives the prompts of one model where params hold a sequence of models.

    Args:
      prompts: a TokenBatch, or a sequence of them.
      i: the model's place.

    Returns:
      The entry, or the TokenBatch.

    Raises:
      ValueError: a sequence that is too short.
    """
    if isinstance(prompts, TokenBatch):
        return prompts
    if not isinstance(prompts, Sequence) or i >= len(prompts):
        raise ValueError(
            f"prompts: expected a TokenBatch or a sequence with an entry {i}, found {type(prompts).__name__}"
        )
    return prompts[i]


def any_prompts(prompts: Prompts) -> TokenBatch:
    """Gives one TokenBatch of a tree of them; batch size and index are the same in all.

    Args:
      prompts: a TokenBatch, or a tree of them.

    Returns:
      The first.
    """
    batches: list[TokenBatch] = jax.tree.leaves(prompts, is_leaf=lambda leaf: isinstance(leaf, TokenBatch))
    return batches[0]


def prompt_index(prompts: Prompts) -> PromptIndex:
    """Gives the prompts' rows in their set.

    Args:
      prompts: a TokenBatch, or a tree of them.

    Returns:
      [B] int32; 0..B-1 where the batch names none.
    """
    batch = any_prompts(prompts)
    if batch.index is None:
        return jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    return batch.index

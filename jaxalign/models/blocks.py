"""The next tokens of each row in one pass behind a cache, of which the first ones are kept."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeGuard

import jax.numpy as jnp

from jaxalign._blocks import first_tokens
from jaxalign.types import Array, Params, State


class BlockModel(Protocol):
    """What a model offers to read several tokens behind its cache without writing them."""

    def segments(self, params: Params, cache: Any, tokens: Array, mask: Array) -> tuple[Array, Any]:
        """(hidden [B,M,S,D], entries) of M segments [B,M,S], as `models.LanguageModel.segments`."""

    def append(self, cache: Any, entries: Any, mask: Array, choice: Array) -> State:
        """Writes the real tokens of segment choice [B] of each row into the cache; -1 freezes a row."""


class Block(NamedTuple):
    """Tokens of each row that were read and not yet written."""

    cache: State
    """That of the text before."""
    entries: Any
    """As `segments` gave them."""
    mask: Array
    """[B,S] bool, the real tokens."""


def reads_blocks(lm: object) -> TypeGuard[BlockModel]:
    """Whether a model reads several tokens in one pass as it reads them one by one. One whose rotary frequencies depend
    on a text's length does not: those of a block's first tokens would depend on its last ones."""
    config = getattr(lm, "config", None)
    offered = hasattr(lm, "segments") and hasattr(lm, "append")
    return offered and getattr(config, "fixed_length", None) is None


def read_block(lm: BlockModel, params: Params, cache: State, tokens: Array, mask: Array) -> tuple[Array, Block]:
    """Hidden states [B,S,D] of tokens [B,S] behind a cache, which is not written."""
    hidden, entries = lm.segments(params, cache, tokens[:, None], mask[:, None])
    return hidden[:, 0], Block(cache, entries, mask)


def append_block(lm: BlockModel, block: Block, count: Array) -> State:
    """The cache with the first count [B] real tokens of a block; 0 freezes a row."""
    kept = first_tokens(block.mask, count)[:, None]
    return lm.append(block.cache, block.entries, kept, jnp.where(count > 0, 0, -1))

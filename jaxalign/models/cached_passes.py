"""Passes of a model that read a cache: a prompt once, then tokens, candidates and segments behind it."""

from __future__ import annotations

import abc
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxalign import mdp
from jaxalign._checks import is_concrete
from jaxalign.models import cache as caches
from jaxalign.models import checks
from jaxalign.models.attention import pack_segments
from jaxalign.models.cache import Cache, KeyValue
from jaxalign.models.config import Config
from jaxalign.models.transformer import Transformer
from jaxalign.types import Array, Params


class CachedPasses(abc.ABC):
    """The half of a `LanguageModel` that reads and writes a cache."""

    config: Config
    dtype: DTypeLike

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """V."""

    @abc.abstractmethod
    def embed(self, params: Params, tokens: Array) -> Array:
        """Gives the input embeddings [...,D] of tokens."""

    @abc.abstractmethod
    def _call(self, params: Params, method: Any, *args: Any) -> Any: ...

    @abc.abstractmethod
    def _check_embeddings(self, embeddings: Array, shape: tuple[int, ...], axes: str) -> None: ...

    @abc.abstractmethod
    def _encode(
        self,
        params: Params,
        tokens: Array,
        mask: Array | None,
        embeddings: Array | None = None,
        at: Array | None = None,
    ) -> tuple[Array, list[KeyValue]]: ...

    def prefill(
        self, params: Params, tokens: Array, mask: Array, capacity: int, *, at: Array | None = None
    ) -> tuple[Array, Cache]:
        """Encodes prompts once. Rows are compacted first, so that slot = position and padding takes no slot.

        Args:
          params: the model's.
          tokens: [B,P] integers.
          mask: [B,P], True on real tokens, under either padding.
          capacity: slots of each row, at least P.
          at: [B], which of its real tokens, from 0, each row's hidden state is given of; None: the last.

        Returns:
          (hidden [B,D], cache).

        Raises:
          ValueError: arrays of another rank or type, ids outside the vocabulary where they are concrete, or a capacity
            below P.
        """
        tokens, mask = checks.real_tokens("tokens", tokens, mask, "[B,P]", self.vocab_size)
        if capacity < tokens.shape[1]:
            raise ValueError(f"capacity: expected at least the prompt's {tokens.shape[1]} slots, found {capacity}")
        fixed = self.config.fixed_length
        if fixed is not None and capacity > fixed:
            warnings.warn(
                f"capacity: {capacity} slots pass the {fixed} tokens beyond which rotary frequencies change with a "
                "text's length: keys that a cache holds keep those they were written with, as in transformers' "
                "generate, and differ from those of a pass over the whole text",
                stacklevel=2,
            )
        tokens, mask = mdp.compact(tokens, mask)
        last = mdp.last_index(mask)
        hidden, entries = self._encode(params, tokens, mask, at=(last if at is None else at)[:, None])
        return hidden[:, 0], caches.filled(entries, last + 1, capacity)

    def candidates(self, params: Params, cache: Cache, tokens: Array) -> tuple[Array, tuple[KeyValue, ...]]:
        """Reads K alternative next tokens in one pass over the shared prefix.

        Args:
          params: the model's.
          cache: of the prefix.
          tokens: [B,K] ids.

        Returns:
          (hidden [B,K,D], entries to `commit`). Hidden states are NaN where more tokens were appended than the cache
          has slots.

        Raises:
          ValueError: tokens of another rank or type, or of another number of rows than the cache.
        """
        tokens = checks.integers("tokens", tokens, "[B,K]")
        checks.rows_of("tokens", tokens, cache.length.shape[0])
        x = self.embed(params, tokens)
        hidden, entries = self._call(params, Transformer.extend, x, cache.length, list(cache.layers))
        lost = cache.length > cache.capacity
        return jnp.where(lost[:, None, None], jnp.nan, hidden), tuple(entries)

    def commit(self, cache: Cache, entries: tuple[KeyValue, ...], choice: Array) -> Cache:
        """Writes one of the candidates of each row into its next slot.

        Args:
          cache: that which the candidates were read with.
          entries: as `candidates` gave them.
          choice: [B], which candidate; −1 writes nowhere and keeps the length.

        Returns:
          The cache.

        Raises:
          ValueError: a choice of another rank or type, or of another number of rows than the cache.
        """
        choice = checks.integers("choice", choice, "[B]")
        checks.rows_of("choice", choice, cache.length.shape[0])
        return caches.commit(cache, entries, choice)

    def segments(
        self,
        params: Params,
        cache: Cache,
        tokens: Array,
        mask: Array,
        *,
        embeddings: Array | None = None,
        packed: int | None = None,
        at: Array | None = None,
    ) -> tuple[Array, tuple[KeyValue, ...]]:
        """Reads M alternative continuations in one pass over the shared prefix, which is neither copied nor written.

        Args:
          params: the model's.
          cache: of the prefixes, B rows.
          tokens: [B,M,S] integers.
          mask: [B,M,S]: real tokens.
          embeddings: [B,M,S,D] in place of the tokens' own.
          packed: a number of tokens, at least that of the real ones, on which projections and MLPs run; B·M·S when
            None.
          at: a place [B,M] in each segment, from 0: hidden states there alone, which saves most of the last layer. -1,
            the last token of an empty segment, gives undefined values.

        Returns:
          (hidden [B,M,S,D], or [B,M,D] with `at`, and entries to `append`). Hidden states are undefined where mask is
          False, and NaN where more tokens were appended than the cache has slots.

        Raises:
          ValueError: arrays of another rank, type, width or number of rows; where they are concrete, ids outside the
            vocabulary, places past the end and fewer packed tokens than real ones.
        """
        if embeddings is None:
            tokens, mask = checks.real_tokens("tokens", tokens, mask, "[B,M,S]", self.vocab_size)
            x = self.embed(params, jnp.where(mask, tokens, 0))
        else:
            x = jnp.asarray(embeddings)
            self._check_embeddings(x, jnp.shape(tokens), "[B,M,S]")
            mask = checks.valid_mask("mask", mask, x.shape[:3], "[B,M,S]")
        checks.rows_of("tokens", mask, cache.length.shape[0])
        if packed is not None and is_concrete(mask) and packed < np.asarray(mask).sum():
            raise ValueError(f"packed: expected at least {np.asarray(mask).sum()} real tokens, found {packed}")
        at = None if at is None else checks.columns(at, mask.shape[:2], mask.shape[2], "[B,M]")
        packing = pack_segments(mask, cache.length, packed)
        x = packing.gather(x.astype(self.dtype))
        last_layer_at = None if at is None or 2 * at.size > x.shape[1] else at  # else more is copied than saved
        hidden, entries = self._call(
            params, Transformer.segments, x, packing, cache.length, list(cache.layers), last_layer_at
        )
        if at is None:
            hidden = packing.scatter(hidden)
        else:
            hidden = (packing.pick(hidden, at) if last_layer_at is None else hidden).reshape(*at.shape, -1)
        lost = (cache.length > cache.capacity).reshape(-1, *(1,) * (hidden.ndim - 1))
        return jnp.where(lost, jnp.nan, hidden), tuple(entries)

    def append(self, cache: Cache, entries: tuple[KeyValue, ...], mask: Array, choice: Array) -> Cache:
        """Writes the real tokens of one of the segments of each row into its next slots.

        Args:
          cache: that which the segments were read with.
          entries: as `segments` gave them.
          mask: [B,M,S], that of `segments`.
          choice: [B], which segment; −1 writes nowhere and keeps the length.

        Returns:
          The cache.

        Raises:
          ValueError: a mask or choice of another rank or type, or of another number of rows than the cache.
        """
        choice = checks.integers("choice", choice, "[B]")
        checks.rows_of("choice", choice, cache.length.shape[0])
        expected = (*entries[0].k.shape[:2], entries[0].k.shape[3])
        return caches.append(cache, entries, checks.valid_mask("mask", mask, expected, "[B,M,S]"), choice)

    def step(self, params: Params, cache: Cache, token: Array) -> tuple[Array, Cache]:
        """Appends a token to each row.

        Args:
          params: the model's.
          cache: of the tokens before.
          token: [B] ids; −1 freezes a row, whose hidden state is then undefined.

        Returns:
          (hidden [B,D], cache). Hidden states are NaN where the cache has no slot left, since a token that nothing
          attends to would be silently wrong.

        Raises:
          ValueError: a token of another rank or type, or of another number of rows than the cache.
        """
        token = checks.integers("token", token, "[B]")
        checks.rows_of("token", token, cache.length.shape[0])
        x = self.embed(params, jnp.maximum(token, 0)[:, None])
        slot = caches.next_slot(cache, token >= 0)
        hidden, layers = self._call(params, Transformer.append, x, cache.length, slot, list(cache.layers))
        full = (token >= 0) & (cache.length >= cache.capacity)
        hidden = jnp.where(full[:, None], jnp.nan, hidden[:, 0])
        return hidden, Cache(tuple(layers), cache.length + (token >= 0))

"""A language model as a value: its configuration and pure functions of its parameters."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import mdp
from jaxalign.models.attention import KeyValue, places, write_segment, write_slot
from jaxalign.models.config import Config, Head
from jaxalign.models.heads import HeadModule
from jaxalign.models.transformer import Transformer, at_columns
from jaxalign.types import Array, Params

DTYPES = ("float32", "bfloat16", "float16", "float64")


class ModelOutput(NamedTuple):
    """logits [B,L,V] in at least float32; hidden [B,L,D] after the final norm; head [B,L,W], or None without a head.
    What is not read costs nothing under jit."""

    logits: Array | None
    hidden: Array
    head: Array | None


class Cache(NamedTuple):
    """layers: one KeyValue [B,Hkv,S,hd] per layer; length [B]: slots filled, which is the next token's position."""

    layers: tuple[KeyValue, ...]
    length: Array


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model without its parameters. Equal configurations are equal models and share traces.

    dtype: of parameters, activations and caches: "float32", "bfloat16", "float16" or (under jax.enable_x64) "float64".
      Norms, softmax, logits and heads come out in at least float32.
    """

    config: Config
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, found {self.dtype!r}")

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def head_width(self) -> int:
        return self.config.head_width

    @property
    def _module(self) -> Transformer:
        return Transformer(self.config, jnp.dtype(self.dtype))

    @property
    def _head_module(self) -> HeadModule:
        if self.config.head is None:
            raise ValueError("head: expected a model with a head, found config.head = None")
        return HeadModule(self.config.head, self.head_width, jnp.dtype(self.dtype))

    def init(self, rng: Array) -> Params:
        """Random parameters (normal 0.02): {"transformer": …, "head": …}. rng: consumed."""
        return _init(self, rng)

    @property
    def has_lm_head(self) -> bool:
        """False for …ForSequenceClassification models, which have no vocabulary logits."""
        return self.config.tie_embeddings or self.config.head is None or self.config.head.kind != "reward"

    def init_head(self, rng: Array) -> Params:
        """Random parameters of the head alone. rng: consumed."""
        hidden = jnp.zeros((1, self.config.hidden_size), jnp.dtype(self.dtype))
        return self._head_module.init(rng, hidden)["params"]

    def _call(self, params: Params, method: Any, *args: Any) -> Any:
        variables = {"params": params["transformer"]}
        if "lora" in params:  # an adapter beside the weights: models.lora.attach
            variables["lora"] = params["lora"]
        return self._module.apply(variables, *args, method=method)

    def embed(self, params: Params, tokens: Array) -> Array:
        """Input embeddings [...,D] of tokens."""
        return self._call(params, Transformer.embed, tokens)

    def hidden(
        self,
        params: Params,
        tokens: Array,
        *,
        mask: Array | None = None,
        embeddings: Array | None = None,
        at: Array | None = None,
    ) -> Array:
        """Hidden states [B,L,D] after the final norm; values at padding are undefined. Arguments as `apply`.

        at [B,R]: columns in [0, L); hidden [B,R,D] of these alone, which saves most of the last layer. A column of -1,
        the last token of a row without one, gives undefined values, one past the end NaN."""
        return self._encode(params, tokens, mask, embeddings, at)[0]

    def _encode(
        self,
        params: Params,
        tokens: Array,
        mask: Array | None,
        embeddings: Array | None = None,
        at: Array | None = None,
    ) -> tuple[Array, list[KeyValue]]:
        shape = tokens.shape if embeddings is None else embeddings.shape[:2]
        mask = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
        if mask.shape != shape or len(shape) != 2:
            raise ValueError(f"mask: expected the shape [B,L] of the tokens, {shape}, found {mask.shape}")
        # A pad id may lie outside the vocabulary, where a look-up gives NaN: it must not reach the real tokens.
        x = self.embed(params, jnp.where(mask, tokens, 0)) if embeddings is None else embeddings
        at = None if at is None else jnp.maximum(at, 0)
        few = None if at is None or 2 * at.shape[1] > shape[1] else at  # else more is copied than saved
        hidden, entries = self._call(params, Transformer.__call__, x.astype(self.dtype), mask, few)
        if at is not None and few is None:
            hidden = at_columns(hidden, at)
        return hidden, entries

    def apply(
        self, params: Params, tokens: Array, *, mask: Array | None = None, embeddings: Array | None = None
    ) -> ModelOutput:
        """All positions in parallel.

        tokens [B,L] int32; mask [B,L] bool, True on real tokens, any padding (all real when None): positions count real
        tokens. embeddings [B,L,D] in place of the tokens' own.
        """
        hidden = self.hidden(params, tokens, mask=mask, embeddings=embeddings)
        logits = self.logits(params, hidden) if self.has_lm_head else None
        return ModelOutput(logits, hidden, None if self.config.head is None else self.head(params, hidden))

    def logits(self, params: Params, hidden: Array) -> Array:
        """[...,D] -> [...,V] in at least float32. ValueError for a model without vocabulary logits."""
        if not self.has_lm_head:
            raise ValueError("logits: expected a language model, found a sequence classifier without lm_head")
        return self._call(params, Transformer.logits, hidden)

    def head(self, params: Params, hidden: Array) -> Array:
        """[...,D] -> [...,W] in at least float32. ValueError for a model without a head."""
        return self._head_module.apply({"params": params["head"]}, hidden)

    def prefill(self, params: Params, tokens: Array, mask: Array, capacity: int) -> tuple[Array, Cache]:
        """Encodes prompts [B,P] once: (hidden [B,D] at the last real token, cache with `capacity` slots per row).

        Rows are compacted first, so that slot = position and padding takes no slot. ValueError when capacity < P.
        """
        if capacity < tokens.shape[1]:
            raise ValueError(f"capacity: expected at least the prompt's {tokens.shape[1]} slots, found {capacity}")
        tokens, mask = mdp.compact(tokens, mask)
        last = mdp.last_index(mask)
        hidden, entries = self._encode(params, tokens, mask, at=last[:, None])
        room = ((0, 0), (0, 0), (0, capacity - tokens.shape[1]), (0, 0))
        layers = tuple(KeyValue(jnp.pad(e.k, room), jnp.pad(e.v, room)) for e in entries)
        return hidden[:, 0], Cache(layers, last + 1)

    def candidates(self, params: Params, cache: Cache, tokens: Array) -> tuple[Array, tuple[KeyValue, ...]]:
        """K alternative next tokens [B,K] in one pass over the shared prefix: (hidden [B,K,D], entries to `commit`).
        NaN where more tokens were appended than the cache has slots."""
        x = self.embed(params, tokens)
        hidden, entries = self._call(params, Transformer.extend, x, cache.length, list(cache.layers))
        lost = cache.length > cache.layers[0].k.shape[2]
        return jnp.where(lost[:, None, None], jnp.nan, hidden), tuple(entries)

    def commit(self, cache: Cache, entries: tuple[KeyValue, ...], choice: Array) -> Cache:
        """Writes candidate choice [B] of each row into its next slot; choice -1 writes nowhere and keeps the length."""
        rows, pick = jnp.arange(choice.shape[0]), jnp.maximum(choice, 0)
        slot = _next_slot(cache, choice >= 0)
        layers = jax.tree.map(lambda old, new: write_slot(old, new[rows, :, pick], slot), cache.layers, entries)
        return Cache(layers, cache.length + (choice >= 0))

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
        """M alternative continuations [B,M,S] in one pass over the shared prefix: (hidden [B,M,S,D], entries to
        `append`). The prefix is read from the cache, which is neither copied nor written.

        mask [B,M,S]: real tokens; hidden is undefined elsewhere. embeddings [B,M,S,D] in place of the tokens' own.
        packed: a number of tokens, at least that of the real ones, on which projections and MLPs run; all B·M·S when
        None. at [B,M]: a place in each segment, from 0 (-1, the last token of none, gives undefined values); hidden
        [B,M,D] there alone, which saves most of the last layer. NaN where more tokens were appended than the cache has
        slots.
        """
        mask = mask.astype(bool)
        x = self.embed(params, jnp.where(mask, tokens, 0)) if embeddings is None else embeddings
        where = places(mask, cache.length, packed)
        x = where.gather(x.astype(self.dtype))
        at = None if at is None else jnp.maximum(at, 0)
        few = None if at is None or 2 * at.size > x.shape[1] else at  # else more is copied than saved
        hidden, entries = self._call(params, Transformer.segments, x, where, cache.length, list(cache.layers), few)
        if at is None:
            hidden = where.spread(hidden)
        else:
            hidden = (where.pick(hidden, at) if few is None else hidden).reshape(*at.shape, -1)
        lost = (cache.length > cache.layers[0].k.shape[2]).reshape(-1, *(1,) * (hidden.ndim - 1))
        return jnp.where(lost, jnp.nan, hidden), tuple(entries)

    def append(self, cache: Cache, entries: tuple[KeyValue, ...], mask: Array, choice: Array) -> Cache:
        """Writes the real tokens of segment choice [B] of each row into its next slots; mask [B,M,S] as in `segments`.
        Choice -1 writes nowhere and keeps the length."""
        rows, pick = jnp.arange(choice.shape[0]), jnp.maximum(choice, 0)
        real = mask[rows, pick] & (choice >= 0)[:, None]
        slot = jnp.where(real, cache.length[:, None] + jnp.cumsum(real, axis=1) - 1, cache.layers[0].k.shape[2])
        layers = jax.tree.map(lambda old, new: write_segment(old, new[rows, pick], slot), cache.layers, entries)
        return Cache(layers, cache.length + real.sum(axis=1, dtype=cache.length.dtype))

    def step(self, params: Params, cache: Cache, token: Array) -> tuple[Array, Cache]:
        """Appends token [B]: (hidden [B,D], cache). Token -1: the row stands still, its hidden is undefined. NaN where
        the cache has no slot left: a token that nothing attends to would be silently wrong."""
        x = self.embed(params, jnp.maximum(token, 0)[:, None])
        slot = _next_slot(cache, token >= 0)
        hidden, layers = self._call(params, Transformer.append, x, cache.length, slot, list(cache.layers))
        full = (token >= 0) & (cache.length >= cache.layers[0].k.shape[2])
        hidden = jnp.where(full[:, None], jnp.nan, hidden[:, 0])
        return hidden, Cache(tuple(layers), cache.length + (token >= 0))


@functools.partial(jax.jit, static_argnums=0)
def _init(lm: LanguageModel, rng: Array) -> Params:
    body, head = jax.random.split(rng)
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    def everything(module: Transformer) -> None:
        hidden, _ = module(module.embed(tokens), mask)
        if lm.has_lm_head:
            module.logits(hidden)

    params = {"transformer": lm._module.init(body, method=everything)["params"]}
    if lm.config.head is not None:
        params["head"] = lm.init_head(head)
    return params


def with_head(lm: LanguageModel, head: Head | None) -> LanguageModel:
    """The same transformer with another head (or none); `init_head` makes its parameters, to stand beside the body's
    under "head". A reward head leaves out lm_head, as …ForSequenceClassification does."""
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, head=head))


def _next_slot(cache: Cache, moves: Array) -> Array:
    """The slot [B] that a row writes: its length, or past the end (dropped) where it stands still."""
    return jnp.where(moves, cache.length, cache.layers[0].k.shape[2])

"""A language model as a value: its configuration and pure functions of its parameters."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxalign import mdp
from jaxalign._checks import check_rng, is_concrete
from jaxalign.models import cache as caches
from jaxalign.models import checks, remat, sharding
from jaxalign.models.attention import pack_segments
from jaxalign.models.cache import Cache, KeyValue
from jaxalign.models.config import Config, Head
from jaxalign.models.heads import HeadModule
from jaxalign.models.transformer import Transformer, at_columns
from jaxalign.types import Array, Params

DTYPES = ("float32", "bfloat16", "float16", "float64")


def dtype_name(dtype: DTypeLike) -> str:
    """The name of a dtype in any form that jax takes ("float32", jnp.float32, np.dtype("float32")).

    ValueError for one that is not of `DTYPES`."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if dtype is None or name not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, found {dtype!r}")
    return name


class ModelOutput(NamedTuple):
    """All that a model says of every position. What is not read costs nothing under jit."""

    logits: Array | None
    """[B,L,V] in at least float32; None for a sequence classifier."""
    hidden: Array
    """[B,L,D] after the final norm."""
    head: Array | None
    """[B,L,W] in at least float32; None without a head."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model without its parameters. Equal configurations are equal models and share traces.

    It offers the Protocols `types.LanguageModel`, `types.HeadModel` and `types.CandidateModel`.

    Fields:
      config: sizes, positions, head.
      dtype: of parameters, activations and caches, in any form that jax takes; it is kept by its name: "float32",
        "bfloat16", "float16" or (under jax.enable_x64) "float64". Norms, softmax, logits and heads come out in at least
        float32.
      mesh: the devices that the parameters lie on (`sharding.shard`): weights and logits are then held where the table
        of logical axes says, rows over data and fsdp. None: one device, or where the partitioner guesses.
      remat: what the backward pass of whole rows keeps of each layer beside its input: "none": all that it reads;
        "dots": the products by weights; "full": nothing, so that each layer runs twice, in the memory of one layer.
        Losses and gradients are the same.

    Raises:
      ValueError: another dtype, mesh or remat, a config that is not a `Config`, or sizes that the mesh does not divide.
    """

    config: Config
    dtype: DTypeLike = "float32"
    mesh: jax.sharding.Mesh | None = None
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            raise ValueError(f"config: expected a models.Config, found {type(self.config).__name__}")
        if self.remat not in remat.POLICIES:
            raise ValueError(f"remat: expected one of {tuple(remat.POLICIES)}, found {self.remat!r}")
        # By name: equal models are then equal and hash alike, however the dtype was written.
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        sharding.check_mesh(self.mesh)
        if self.mesh is not None:
            c = self.config
            sizes = {"num_heads": c.num_heads, "intermediate_size": c.intermediate_size, "vocab_size": c.vocab_size}
            sharding.check_sizes(self.mesh, "tensor", sizes)
            sharding.check_sizes(self.mesh, "fsdp", {"hidden_size": c.hidden_size})

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """Longest text, prompt and response together [tokens]."""
        return self.config.max_length

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response."""
        return self.config.eos_ids

    @property
    def head_width(self) -> int:
        """W of the head's output; 0 without a head."""
        return self.config.head_width

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of a reward head's labels; () of other heads and without one."""
        return self.config.label_names

    @property
    def reward_pad_id(self) -> int | None:
        """The id that a reward head is not read at (`models.read_index`): its pad id; None of other heads."""
        return self.config.reward_pad_id

    @property
    def _module(self) -> Transformer:
        return Transformer(self.config, jnp.dtype(self.dtype), self.mesh, self.remat)

    @property
    def _head_module(self) -> HeadModule:
        if self.config.head is None:
            raise ValueError("head: expected a model with a head, found config.head = None")
        return HeadModule(self.config.head, self.head_width, jnp.dtype(self.dtype))

    def init(self, rng: Array) -> Params:
        """Draws random parameters (normal, 0.02).

        Args:
          rng: a key; consumed.

        Returns:
          {"transformer": …, "head": …}.

        Raises:
          ValueError: an rng that is no key.
        """
        check_rng(rng)
        return _init(self, rng)

    @property
    def has_lm_head(self) -> bool:
        """False for …ForSequenceClassification models, which have no vocabulary logits: also where the embeddings are
        tied, since the hidden states were trained for the score."""
        return self.config.head is None or self.config.head.kind != "reward"

    def init_head(self, rng: Array) -> Params:
        """Draws random parameters of the head alone.

        Args:
          rng: a key; consumed.

        Returns:
          The entry "head" of the model's parameters.

        Raises:
          ValueError: a model without a head, or an rng that is no key.
        """
        check_rng(rng)
        hidden = jnp.zeros((1, self.config.hidden_size), jnp.dtype(self.dtype))
        return self._head_module.init(rng, hidden)["params"]

    def _call(self, params: Params, method: Any, *args: Any) -> Any:
        variables = {"params": params["transformer"]}
        if "lora" in params:  # an adapter beside the weights: models.lora.attach
            variables["lora"] = params["lora"]
        return self._module.apply(variables, *args, method=method)

    def embed(self, params: Params, tokens: Array) -> Array:
        """Gives the input embeddings of tokens.

        Args:
          params: the model's.
          tokens: [...] ids.

        Returns:
          [...,D].

        Raises:
          ValueError: tokens that are not integers.
        """
        if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise ValueError(f"tokens: expected integers, found {jnp.result_type(tokens)}")
        found: Array = self._call(params, Transformer.embed, tokens)
        return found

    def hidden(
        self,
        params: Params,
        tokens: Array,
        *,
        mask: Array | None = None,
        embeddings: Array | None = None,
        at: Array | None = None,
    ) -> Array:
        """Hidden states after the final norm.

        Args:
          params: the model's.
          tokens: [B,L] integers.
          mask: [B,L], True on real tokens, under any padding (all real when None); positions count real tokens.
          embeddings: [B,L,D] in place of the tokens' own.
          at: columns [B,R] in [0, L): only their states are given, which saves most of the last layer. A column of -1,
            the last token of a row without one, gives undefined values; a traced one past the end gives NaN.

        Returns:
          [B,L,D], or [B,R,D] with `at`; values at padding are undefined.

        Raises:
          ValueError: arrays of another rank, type or width; ids outside the vocabulary and columns past the end, where
            they are concrete.
        """
        return self._encode(params, tokens, mask, embeddings, at)[0]

    def _encode(
        self,
        params: Params,
        tokens: Array,
        mask: Array | None,
        embeddings: Array | None = None,
        at: Array | None = None,
    ) -> tuple[Array, list[KeyValue]]:
        if embeddings is None:
            tokens, mask = checks.real_tokens("tokens", tokens, mask, "[B,L]", self.vocab_size)
            # A pad id may lie outside the vocabulary, where a look-up gives NaN: it must not reach the real tokens.
            x = self.embed(params, jnp.where(mask, tokens, 0))
        else:
            x = jnp.asarray(embeddings)
            self._check_embeddings(x, jnp.shape(tokens), "[B,L]")
            mask = checks.valid_mask("mask", mask, x.shape[:2], "[B,L]")
        batch, length = x.shape[:2]
        at = None if at is None else checks.columns(at, (batch,), length, "[B,R]")
        last_layer_at = None if at is None or 2 * at.shape[1] > length else at  # else more is copied than saved
        hidden, entries = self._call(params, Transformer.__call__, x.astype(self.dtype), mask, last_layer_at)
        if at is not None and last_layer_at is None:
            hidden = at_columns(hidden, at)
        return hidden, entries

    def _check_embeddings(self, embeddings: Array, shape: tuple[int, ...], axes: str) -> None:
        checks.widths("embeddings", embeddings, self.config.hidden_size)
        if embeddings.shape[:-1] != shape or len(shape) != axes.count(",") + 1:
            raise ValueError(f"embeddings: expected one for each token {axes}, {shape}, found {embeddings.shape}")

    def apply(
        self, params: Params, tokens: Array, *, mask: Array | None = None, embeddings: Array | None = None
    ) -> ModelOutput:
        """Gives logits, hidden states and the head at all positions, in parallel.

        Args:
          params: the model's.
          tokens, mask, embeddings: as in `hidden`.

        Returns:
          A ModelOutput over [B,L].

        Raises:
          ValueError: as in `hidden`.
        """
        hidden = self.hidden(params, tokens, mask=mask, embeddings=embeddings)
        logits = self.logits(params, hidden) if self.has_lm_head else None
        return ModelOutput(logits, hidden, None if self.config.head is None else self.head(params, hidden))

    def logits(self, params: Params, hidden: Array) -> Array:
        """Gives the logits of the next token.

        Args:
          params: the model's.
          hidden: [...,D], after the final norm.

        Returns:
          [...,V], in at least float32.

        Raises:
          ValueError: a model without vocabulary logits, or hidden states of another width.
        """
        if not self.has_lm_head:
            raise ValueError("logits: expected a language model, found a sequence classifier without lm_head")
        checks.widths("hidden", hidden, self.config.hidden_size)
        found: Array = self._call(params, Transformer.logits, hidden)
        return found

    def head(self, params: Params, hidden: Array) -> Array:
        """Gives the output of the model's head.

        Args:
          params: the model's.
          hidden: [...,D], after the final norm.

        Returns:
          [...,W], in at least float32.

        Raises:
          ValueError: a model without a head, or hidden states of another width.
        """
        module = self._head_module
        checks.widths("hidden", hidden, self.config.hidden_size)
        found: Array = module.apply({"params": params["head"]}, hidden)
        return found

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
    """Gives the same transformer with another head, or with none.

    `init_head` makes the head's parameters, which stand beside the body's under "head". A reward head leaves out
    lm_head, as …ForSequenceClassification does.

    Args:
      lm: the model.
      head: the head; None for a language model.

    Returns:
      The model.
    """
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, head=head))

"""A language model as a value: its configuration and pure functions of its parameters."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxalign._checks import check_rng
from jaxalign.models import checks, gathering, parameters, remat, sharding
from jaxalign.models.cache import KeyValue
from jaxalign.models.cached_passes import CachedPasses
from jaxalign.models.config import Config, Head
from jaxalign.models.heads import HeadModule
from jaxalign.models.parameters import part_of
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
class LanguageModel(CachedPasses):
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
      gather: where matrices that are split over fsdp are put together. "in_turn": when their layer multiplies by them,
        in decoding at each token, in the memory of one layer. "ahead": where the compiler likes, which may be ahead of
        a loop over tokens: faster, and each device then holds all layers, as on a mesh of data alone. "auto": ahead
        where an accelerator's memory is known and a quarter of it holds them all, else in turn. The numbers are the
        same. A layer that `remat` computes again is in turn as it is.

    Raises:
      ValueError: another dtype, mesh, remat or gather, a config that is not a `Config`, or sizes that the mesh does not
        divide.
    """

    config: Config
    dtype: DTypeLike = "float32"
    mesh: jax.sharding.Mesh | None = None
    remat: Literal["none", "dots", "full"] = "none"
    gather: gathering.Gather = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            raise ValueError(f"config: expected a models.Config, found {type(self.config).__name__}")
        if self.remat not in remat.POLICIES:
            raise ValueError(f"remat: expected one of {tuple(remat.POLICIES)}, found {self.remat!r}")
        if self.gather not in gathering.GATHERS:
            raise ValueError(f"gather: expected one of {gathering.GATHERS}, found {self.gather!r}")
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
    def reward_pooling(self) -> Literal["last", "mean"]:
        """How a reward head reads a text, "last" or "mean" (`models.Head`); "last" of other heads."""
        return self.config.reward_pooling

    @property
    def _module(self) -> Transformer:
        in_turn = gathering.is_in_turn(self.gather, self.mesh, functools.partial(_whole_bytes, self))
        return Transformer(self.config, jnp.dtype(self.dtype), self.mesh, self.remat, in_turn)

    @property
    def _head_module(self) -> HeadModule:
        if self.config.head is None:
            raise ValueError("head: expected a model with a head, found config.head = None")
        return HeadModule(self.config.head, self.head_width, jnp.dtype(self.dtype), self.vocab_size)

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

    def check_params(self, params: Params, *, head: bool = True) -> None:
        """Checks on the host that parameters are this model's. Decoders do so before they trace.

        Args:
          params: the model's, as `models.load` and `init` give them.
          head: whether those of the head have to be there, too.

        Raises:
          ParamsError: a ValueError that names the first array that is missing or of another shape.
        """
        parameters.check_params(self, params, head=head)

    def _call(self, params: Params, method: Any, *args: Any) -> Any:
        variables = {"params": part_of(params, "transformer")}
        if "lora" in params:  # an adapter beside the weights: models.lora.attach
            variables["lora"] = params["lora"]
        try:
            return self._module.apply(variables, *args, method=method)
        except (flax.errors.ScopeParamNotFoundError, flax.errors.ScopeParamShapeError):
            self.check_params(params, head=False)  # which says it in words of ours
            raise

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
        found: Array = module.apply({"params": part_of(params, "head")}, hidden)
        return found

    def laws_after(self, params: Params, hidden: Array, tokens: Array) -> Array:
        """Gives the law of the reward after each of several tokens, by a Q head of laws.

        Args:
          params: the model's.
          hidden: [...,D], after the final norm.
          tokens: [...,k], ids that may come next; or [k], the same ids at each hidden state, whose weights are then
            read once.

        Returns:
          Log-probabilities of the support [...,k,K], in at least float32.

        Raises:
          ValueError: a head that is no Q head of laws, or hidden states of another width.
        """
        head = self.config.head
        if head is None or head.kind != "q" or head.distribution is None:
            raise ValueError(f"laws_after: expected a Q head with a distribution, found {head}")
        checks.widths("hidden", hidden, self.config.hidden_size)
        found: Array = self._head_module.apply({"params": params["head"]}, hidden, tokens, method="after_tokens")
        return found


@functools.cache
def _whole_bytes(lm: LanguageModel) -> int:
    assert lm.mesh is not None
    alone = dataclasses.replace(lm, mesh=None)  # whose own parameters ask for no mesh's memory
    body = {"transformer": jax.eval_shape(alone.init, jax.random.key(0))["transformer"]}
    return gathering.whole_bytes(body, lm.mesh, lm.dtype)


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

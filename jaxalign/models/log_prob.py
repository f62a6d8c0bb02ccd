"""Statistics of the logits, position by position in chunks: [B,L,V] is never kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, TypeVarTuple, Unpack, cast

import chex
import jax
import jax.numpy as jnp

from jaxalign import mdp
from jaxalign.models import sharding
from jaxalign.models.remat import after
from jaxalign.types import Array, Params, TokenBatch

T = TypeVar("T")
Arrays = TypeVarTuple("Arrays")


class HasHidden(Protocol):
    """A model that gives the hidden states of whole texts, as `models.LanguageModel.hidden` does."""

    def hidden(self, params: Params, tokens: Array, *, mask: Array | None = None, at: Array | None = None) -> Array:
        """Hidden states [B,R,D] at the columns at [B,R] of texts [B,L]."""


class HasLogits(Protocol):
    """A model that gives vocabulary logits of hidden states."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def logits(self, params: Params, hidden: Array) -> Array:
        """[...,D] -> [...,V] in at least float32."""


TOKENS = 2048
"""Tokens whose logits are alive together, at a vocabulary of 32,000 a quarter of a GB."""
KEPT = 2**24
"""Numbers, 64 MiB of them in float32, that are rather kept for the backward pass than computed again."""


def chunked(
    f: Callable[[Unpack[Arrays]], T], *arrays: *Arrays, chunk: int | None = None, width: int | None = None
) -> T:
    """Applies f to chunks of positions (axis 1), and joins its results.

    Several chunks are rematerialised in the backward pass, so that at most one chunk of what f makes inside is alive.

    Args:
      f: from arrays [B,chunk,...] to a tree of arrays [B,chunk,...]. It must treat positions independently: the last
        chunk is padded with zeros, whose results are dropped.
      arrays: [B,L,...] each.
      chunk: at most so many positions; None: 64, or fewer, so that a batch has no more than 2048 tokens in a chunk, or
        all of them where f makes `width` numbers of each token and that is no more than 2^24 in all.
      width: how many numbers f makes of each token.

    Returns:
      The results of f, leaves [B,L,...].

    Raises:
      ValueError: no array, arrays of other batches or lengths, a chunk below 1.
    """
    given = cast(tuple[Array, ...], arrays)
    if not given or any(x.ndim < 2 or x.shape[:2] != given[0].shape[:2] for x in given):
        raise ValueError(f"arrays: expected one [B,L] in all of them, found shapes {[x.shape for x in given]}")
    batch, length = given[0].shape[:2]
    if chunk is None and width is not None and length and batch * length * width <= KEPT:
        return f(*arrays)
    if chunk is None:
        chunk = min(max(TOKENS // max(batch, 1), 1), 64)
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 position, found {chunk}")
    # As many chunks as it takes, of one size: the padding is less than a position for each.
    chunk = -(-length // -(-length // chunk)) if length else 1
    padding = -length % chunk

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]

    # Inside a loop the compiler cannot undo the rematerialisation, so it need not be guarded against.
    part = jax.checkpoint(lambda arrays: f(*arrays), prevent_cse=False)
    parts = jax.lax.map(part, tuple(split(x) for x in given))
    joined: T = jax.tree.map(join, parts)
    return joined


def response_hidden(lm: HasHidden, params: Params, prompts: TokenBatch, tokens: Array, mask: Array) -> Array:
    """Hidden states that each token of the responses is drawn from, in one parallel pass over prompts and responses.

    Args:
      lm: the model.
      params: its parameters.
      prompts: a TokenBatch [B,P].
      tokens: [B,T], right-padded responses.
      mask: [B,T], True on their tokens.

    Returns:
      [B,T,D].
    """
    joined, joined_mask, prompt_length = mdp.concatenate(prompts, tokens, mask)
    # Token t of a response is predicted at position prompt_length + t - 1 of the compacted row.
    position = prompt_length[:, None] - 1 + jnp.arange(tokens.shape[1])
    return lm.hidden(params, joined, mask=joined_mask, at=jnp.minimum(position, joined.shape[1] - 1))


def token_log_prob(lm: HasLogits, params: Params, hidden: Array, targets: Array, *, chunk: int | None = None) -> Array:
    """log pi(target|hidden): the target's logit minus log-sum-exp. [B,L,V] is never kept whole.

    Args:
      lm: the model.
      params: its parameters.
      hidden: [B,L,D].
      targets: [B,L] token ids.
      chunk: positions at a time, as in `chunked`.

    Returns:
      [B,L], in nats.

    Raises:
      ValueError: hidden and targets of different batches or lengths, a chunk below 1.
    """
    chex.assert_rank([hidden, targets], [3, 2])
    params = _waiting(lm, params, hidden)

    def part(hidden: Array, targets: Array) -> Array:
        logits = lm.logits(params, hidden)
        picked: Array = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    return chunked(part, hidden, targets, chunk=chunk, width=lm.vocab_size)


def _waiting(lm: HasLogits, params: Params, hidden: Array) -> Params:
    """The parameters, whose vocabulary matrix is put together from shards once there are hidden states. It is an
    argument of the loop over chunks: a frozen one would else lie there whole while the layers run."""
    mesh = getattr(lm, "mesh", None)
    if not sharding.is_split(mesh, "fsdp"):
        return params
    name = "lm_head" if "lm_head" in params["transformer"] else "embedding"
    with jax.named_scope("Transformer.logits"):  # a profile counts what the compiler makes of this to the head
        tied = {"transformer": {name: after(params["transformer"][name], hidden)}}
        return {**params, "transformer": params["transformer"] | sharding.constrain(tied, mesh)["transformer"]}

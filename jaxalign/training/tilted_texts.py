"""A follower by tokens in parallel: the reward of every candidate of every step of given texts, in one pass.

`decoding.log_prob` steps any tilt through a response, one token after the other. Where the critic is a reward model
that reads partial texts (`critics.args`), one pass over the whole text gives the keys and values of every prefix, and
a second pass reads the candidates of all steps against them. The numbers are the same; a gradient takes one backward
pass in place of one for each token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign import mdp, models
from jaxalign._arrays import largest
from jaxalign._blocks import last_moved
from jaxalign.rewards import reading as readings
from jaxalign.types import Array, Params, TokenBatch

TOGETHER = 8192
"""Candidates of all texts that are read together; of more, a part of the steps at a time, each read once more in the
backward pass."""


def candidate_rewards(
    lm: models.LanguageModel,
    params: Params,
    prompts: TokenBatch,
    tokens: Array,
    mask: Array,
    candidates: Array,
    place: Array,
) -> Array:
    """Gives a reward model's score of each partial text that a candidate ends, as `critics.args` reads it.

    Args:
      lm: a model with a scalar reward head.
      params: its parameters.
      prompts: a TokenBatch [N,P].
      tokens: [N,T], right-padded responses.
      mask: [N,T] bool, True on real tokens.
      candidates: [N,T,K], ids in the place of each token.
      place: [N,T], which candidate each token is.

    Returns:
      q [N,T,K] in at least float32; undefined where mask is False.
    """
    read_as = readings.reading_of("leader", lm)
    texts, real, length = mdp.concatenate(prompts, tokens, mask)
    before = real & (jnp.arange(texts.shape[1]) < length[:, None])
    at = models.read_index(texts, before, read_as.pad_id)
    hidden, cache = lm.prefill(params, texts, real, texts.shape[1], at=at)
    # Token t follows the prompt and t tokens, whose slots are the first of its row.
    lengths = jnp.minimum(length[:, None] + jnp.arange(tokens.shape[1]), real.sum(axis=1, keepdims=True))

    def read(length: Array, ids: Array) -> Array:
        return lm.candidates(params, cache._replace(length=length), ids)[0]

    def read_steps(lengths: Array, ids: Array) -> Array:
        """[N,C,K,D] of C steps, which share the cache."""
        return jax.vmap(read, in_axes=(1, 1), out_axes=1)(lengths, ids)

    steps = max(TOGETHER // (candidates.shape[0] * candidates.shape[2]), 1)
    if steps >= candidates.shape[1]:
        states = read_steps(lengths, candidates)
    else:
        states = models.chunked(read_steps, lengths, candidates, chunk=steps)
    if read_as.pooling == "mean":
        prompt = models.pooled(lm.hidden(params, texts, mask=before), texts, before, read_as.pad_id)
        each = models.pooled(
            states[..., None, :], candidates[..., None], jnp.ones((*candidates.shape, 1), bool), read_as.pad_id
        )
        chosen = jax.tree.map(lambda x: _at(x, place) * _like(mask, x[:, :, 0]), each)
        ahead = jax.tree.map(lambda x: jnp.cumsum(x, axis=1) - x, chosen)
        so_far = jax.tree.map(lambda first, rest: (first[:, None] + rest)[:, :, None], prompt, ahead)
        return readings.value(read_as, lm, params, so_far.plus(each).mean)
    q = readings.value(read_as, lm, params, states)
    if read_as.pad_id is None:
        return q
    # The pad id, also where it is an EOS, has the score of the text before it.
    start = readings.value(read_as, lm, params, hidden)
    score = last_moved(start, _at(q, place), mask & (tokens != read_as.pad_id))[:, :-1]
    return jnp.where(candidates == read_as.pad_id, score[..., None], q)


def _at(table: Array, place: Array) -> Array:
    """Entries [N,T,...] of a table [N,T,K,...] at place [N,T]."""
    at = place.reshape(*place.shape, *(1,) * (table.ndim - 2))
    return jnp.take_along_axis(table, at, axis=2)[:, :, 0]


def _like(mask: Array, x: Array) -> Array:
    """A mask [N,T] as numbers that are multiplied with x [N,T,...]."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)).astype(x.dtype)


def tilted_log_prob(
    lm: models.LanguageModel,
    params: Params,
    base: models.LanguageModel,
    base_params: Params,
    prompts: TokenBatch,
    tokens: Array,
    mask: Array,
    *,
    beta: float,
    top_k: int,
) -> Array:
    """Gives log pi(y|x) of responses under the base tilted at each token by a reward model's score of the partial text.

    The law is that of `policies.tilt(policies.language_model(base), critics.args(lm), top_k=top_k)`. A token of the
    response that is not among the top_k by the last bits of this pass takes the place of the last of them.

    Args:
      lm: the reward model.
      params: its parameters, in which the result is differentiated.
      base: of the same vocabulary.
      base_params: its parameters, which are held fixed.
      prompts: a TokenBatch [N,P].
      tokens: [N,T], right-padded responses.
      mask: [N,T] bool, True on real tokens.
      beta: KL weight > 0 [units of reward per nat].
      top_k: candidates of each step.

    Returns:
      [N], in nats.
    """
    hidden = models.response_hidden(base, base_params, prompts, tokens, mask)

    def offered(hidden: Array, tokens: Array) -> tuple[Array, Array, Array]:
        log_prob = jax.nn.log_softmax(base.logits(base_params, hidden))
        value, ids = largest(log_prob, top_k)
        own = jnp.take_along_axis(log_prob, tokens[..., None], axis=-1)
        absent = (ids != tokens[..., None]).all(axis=-1, keepdims=True) & (jnp.arange(top_k) == top_k - 1)
        ids = jnp.where(absent, tokens[..., None], ids).astype(jnp.int32)
        return jnp.where(absent, own, value), ids, jnp.argmax(ids == tokens[..., None], axis=-1)

    log_base, candidates, place = jax.lax.stop_gradient(models.chunked(offered, hidden, tokens, width=base.vocab_size))
    q = candidate_rewards(lm, params, prompts, tokens, mask, candidates, place)
    log_prob = jax.nn.log_softmax(log_base + jnp.where(mask[..., None], q, 0) / beta)
    return jnp.where(mask, _at(log_prob, place), 0).sum(axis=1)

"""Rewards that keep a prefix: what a `PrefixReward` is for a reward model, for a combination, and for any function.

A decoder that scores many texts with one beginning reads the beginning once. `prefix_reward(reward)` is the one way to
ask: the reward's own `prefix`, or a form that keeps the text and reads it whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxalign import mdp, models
from jaxalign._arrays import at_least_float32, where_rows
from jaxalign.prompts import prompt_index
from jaxalign.rewards import reading as readings
from jaxalign.rewards.reading import Reading
from jaxalign.rewards.token_scores import TokenScore
from jaxalign.rewards.values import check_values
from jaxalign.rewards.whole_texts import whole_text, whole_text_token_gradient
from jaxalign.shapes import (
    Candidates,
    Choice,
    Hidden,
    PerPrompt,
    PromptMask,
    PromptTokens,
    ResponseMask,
    ResponseTokens,
    RewardValues,
    Scores,
    TextIndex,
    TextLength,
)
from jaxalign.types import (
    Array,
    CandidateModel,
    HeadModel,
    Params,
    PrefixReward,
    PrefixTokenGradient,
    Reward,
    State,
    TokenBatch,
)


@runtime_checkable
class PrefixModel(HeadModel, Protocol):
    """What a reward model offers beyond HeadModel to keep a prefix in its cache."""

    def embed(self, params: Params, tokens: Array) -> Array:
        """Input embeddings [...,D] of tokens [...]."""

    def prefill(
        self, params: Params, tokens: PromptTokens, mask: PromptMask, capacity: int, *, at: TextLength | None = None
    ) -> tuple[Hidden, State]:
        """As CandidateModel.prefill."""

    def segments(
        self,
        params: Params,
        cache: Any,
        tokens: Array,
        mask: Array,
        *,
        embeddings: Array | None = None,
        packed: int | None = None,
        at: Array | None = None,
    ) -> tuple[Array, State]:
        """M alternative continuations [B,M,S] over the shared prefix: (hidden at the columns at [B,M], or of all
        [B,M,S,D], entries to `append`), as `models.LanguageModel.segments`."""

    def append(self, cache: Any, entries: Any, mask: Array, choice: Choice) -> State:
        """Writes segment choice [B] of each row into the cache; -1 freezes a row."""


def prefix_reward(reward: Reward) -> PrefixReward:
    """Gives the form of a Reward that keeps a prefix: its own, or `whole_text`."""
    own: PrefixReward | None = getattr(reward, "prefix", None)
    return whole_text(reward) if own is None else own


def prefix_token_gradient(gradient: TokenScore) -> PrefixTokenGradient:
    """Gives the form of a token gradient that keeps a prefix: its own, or `whole_text_token_gradient`."""
    own: PrefixTokenGradient | None = getattr(gradient, "prefix", None)
    return whole_text_token_gradient(gradient) if own is None else own


# A reward model -------------------------------------------------------------------------------------------------------


class ModelPrefix(NamedTuple):
    """State of a reward model that keeps a prefix."""

    cache: State
    """The model's cache of the prefix."""
    reward: PerPrompt
    """[N], of the prefix, its tail included where it has ended."""
    pooled: models.Pooled | None = None
    """The hidden states of the same tokens, added up, of a head that pools by the mean; None of another."""


class ModelProposal(NamedTuple):
    """What a reward model computed of M segments."""

    entries: State
    """Cache entries [N,M,S,...] to append."""
    mask: Array
    """[N,M,S] bool, the segments' real tokens."""
    reward: Array
    """[N,M]."""
    pooled: models.Pooled | None = None
    """Over [N,M], the states of prefix and segment; None as in a state."""


def model_prefix(lm: PrefixModel, reading: Reading) -> PrefixReward:
    """Builds the prefix form of a reward model's scalar: the prefix is in its cache, and only the segment is read, with
    the tail of one that has ended, in as narrow a pass as holds it (`_sizes`).

    A segment without a token that the model is read at (`reading`) has the prefix's reward. The tail is never written
    to the cache: no token other than the pad id may follow an end.
    """

    def init(params: Params, prompts: TokenBatch, max_new_tokens: int) -> ModelPrefix:
        capacity = prompts.tokens.shape[1] + max_new_tokens
        return prefilled(lm, reading, params, prompts, capacity)

    def score(params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]:
        return read_segments(lm, reading, params, state, tokens, mask)

    def commit(params: Params, state: State, proposal: State, choice: Choice) -> ModelPrefix:
        cache = lm.append(state.cache, proposal.entries, proposal.mask, choice)
        chosen = jnp.maximum(choice, 0)[:, None]
        kept = lambda new, old: where_rows(choice < 0, old, jax.vmap(lambda x, i: x[i[0]])(new, chosen))  # noqa: E731
        return ModelPrefix(cache, *jax.tree.map(kept, (proposal.reward, proposal.pooled), (state.reward, state.pooled)))

    return PrefixReward(init, score, commit)


def read_segments(
    lm: PrefixModel, reading: Reading, params: Params, state: ModelPrefix, tokens: Array, mask: Array
) -> tuple[Array, ModelProposal]:
    """(reward [N,M], proposal) of segments [N,M,S] after a prefix, with the tail of those that have ended."""
    read = functools.partial(_read, lm, reading, params, state)
    found, proposal = _sized(read, False, reading, tokens, mask)
    return found, proposal


def prefilled(
    lm: PrefixModel | CandidateModel, reading: Reading, params: Params, prompts: TokenBatch, capacity: int
) -> ModelPrefix:
    """The state of the prompts."""
    given = readings.model_params(reading, params)
    if reading.pooling == "mean":  # prefill gives the states of one token alone: the prompts are read twice
        tokens, mask = mdp.compact(prompts.tokens, prompts.mask)
        _, cache = lm.prefill(given, tokens, mask, capacity)
        pooled = models.pooled(lm.hidden(given, tokens, mask=mask), tokens, mask, reading.pad_id)
        return ModelPrefix(cache, readings.value(reading, lm, params, pooled.mean), pooled)
    if reading.pad_id is None:
        hidden, cache = lm.prefill(given, prompts.tokens, prompts.mask.astype(bool), capacity)
    else:
        tokens, mask = mdp.compact(prompts.tokens, prompts.mask)
        place = models.read_index(tokens, mask, reading.pad_id)
        hidden, cache = lm.prefill(given, tokens, mask, capacity, at=place)
    return ModelPrefix(cache, readings.value(reading, lm, params, hidden))


def model_token_gradient(lm: PrefixModel, reading: Reading) -> PrefixTokenGradient:
    """Builds the prefix form of `rewards.token_gradient`: nothing before the segment depends on its first token, so the
    backward pass, too, goes through the segment alone."""

    def score(
        params: Params, state: State, tokens: ResponseTokens, mask: ResponseMask, candidates: Candidates
    ) -> tuple[RewardValues, Scores, State]:
        segment = (tokens[:, None], mask[:, None])
        read = functools.partial(_read_and_slope, lm, reading, params, state)
        found, gradient, proposal = _sized(read, True, reading, *segment)
        table = at_least_float32(lm.embed(readings.model_params(reading, params), candidates))
        return found[:, 0], jnp.einsum("nkd,nd->nk", table, gradient), proposal

    return PrefixTokenGradient(model_prefix(lm, reading), score)


def _read(
    lm: PrefixModel,
    reading: Reading,
    params: Params,
    state: ModelPrefix,
    tokens: Array,
    mask: Array,
    packed: int,
    embeddings: Array | None = None,
) -> tuple[Array, ModelProposal]:
    """(reward [N,M], proposal) of segments [N,M,S] in a pass of `packed` tokens."""
    given = readings.model_params(reading, params)
    if reading.pooling == "mean":
        assert state.pooled is not None
        hidden, entries = lm.segments(given, state.cache, tokens, mask, packed=packed, embeddings=embeddings)
        before = jax.tree.map(lambda x: x[:, None], state.pooled)
        pooled = before.plus(models.pooled(hidden, tokens, mask, reading.pad_id))
        found = readings.value(reading, lm, params, pooled.mean)
        return found, ModelProposal(entries, mask, found, pooled)
    last = models.last_read_index(tokens, mask, reading.pad_id)
    hidden, entries = lm.segments(given, state.cache, tokens, mask, packed=packed, at=last, embeddings=embeddings)
    found = jnp.where(last >= 0, readings.value(reading, lm, params, hidden), state.reward[:, None])
    return found, ModelProposal(entries, mask, found)


def _read_and_slope(
    lm: PrefixModel,
    reading: Reading,
    params: Params,
    state: ModelPrefix,
    tokens: Array,
    mask: Array,
    packed: int,
) -> tuple[Array, Array, ModelProposal]:
    """(reward [N,1], its gradient [N,D] in the embedding of the first token, proposal) of segments [N,1,S]."""
    embeddings = lm.embed(readings.model_params(reading, params), jnp.where(mask, tokens, 0))

    def total(e: Array) -> tuple[Array, tuple[Array, ModelProposal]]:
        replaced = embeddings.at[:, 0, 0].set(e)
        found, proposal = _read(lm, reading, params, state, tokens, mask, packed, embeddings=replaced)
        return found.sum(), (found, proposal)

    gradient, (found, proposal) = jax.grad(total, has_aux=True)(embeddings[:, 0, 0])
    return found, at_least_float32(gradient), proposal


def _sizes(rows: int, width: int, *, ragged: bool) -> list[tuple[int, int]]:
    """(columns, packed tokens) of the passes that are compiled for `rows` segments of at most `width` tokens, the
    smallest first; the last holds everything. ragged: few of the rows may have a segment, or short ones: from 2 tokens
    a row on, each pass two or four times the one before, and a row up to eight times as long as the mean. Otherwise one
    smaller pass, for what ended early: each pass is compiled, in every program that scores."""
    ratio, packed = (2 if width <= 64 else 4), max(16, 2 * rows)
    if not ragged:
        ratio, packed = 4, max(16, rows * width // 4)
    sizes = []
    while 2 * packed <= rows * width:
        sizes.append((min(width, packed, max(16, 8 * packed // rows)), packed))
        packed *= ratio
    return [*sizes, (width, rows * width)]


class ReadSegments(Protocol):
    """A pass of `packed` tokens over segments [N,M,S]: what it found, the ModelProposal last."""

    def __call__(self, tokens: Array, mask: Array, packed: int, /) -> tuple[Any, ...]: ...


def _sized(read: ReadSegments, ragged: bool, reading: Reading, tokens: Array, mask: Array) -> Any:
    """read(tokens, mask, packed) of segments [N,M,S], with the tail of those that have ended, in the first of the
    `_sizes` that holds the real tokens; the entries of its proposal are those of the S columns."""
    room = mask.shape[2]
    tokens, real = readings.follow(reading, tokens, mask, readings.has_ended(reading, tokens, mask))
    rows, width = real.shape[0] * real.shape[1], real.shape[2]
    sizes, last = _sizes(rows, width, ragged=ragged), mdp.last_index(real)

    def at(columns: int, packed: int) -> Callable[[], Any]:
        def run() -> Any:
            *found, proposal = read(tokens[..., :columns], real[..., :columns], packed)
            more = ((0, 0), (0, 0), (0, 0), (0, max(0, room - columns)), (0, 0))
            entries = jax.tree.map(lambda x: jnp.pad(x[..., :room, :], more), proposal.entries)
            return (*found, proposal._replace(entries=entries, mask=mask))

        return run

    if len(sizes) == 1:
        return at(*sizes[0])()
    longest, total = last.max() + 1, real.sum()
    fits = jnp.stack([(longest <= columns) & (total <= packed) for columns, packed in sizes])
    return jax.lax.switch(jnp.argmax(fits), [at(*size) for size in sizes])


# Combinations ---------------------------------------------------------------------------------------------------------


class CombinedPrefix(NamedTuple):
    """State of a combination of rewards that keep a prefix."""

    parts: tuple[State, ...]
    """The state of each part."""
    prompt_index: TextIndex
    """[N], the prompt's row in its set."""


def combined_prefix(
    parts: Sequence[Reward],
    params_of: Callable[[Params], Sequence[Params]],
    combine: Callable[[Params, Array, TextIndex], RewardValues],
) -> PrefixReward | None:
    """Builds the prefix form of a combination of rewards.

    Args:
      parts: m Rewards.
      params_of: the parameters of each part from those of the combination.
      combine: combine(params, rewards [m,N], index [N]) -> [N].

    Returns:
      A PrefixReward, or None where one of the parts keeps no prefix.
    """
    kept = [getattr(part, "prefix", None) for part in parts]
    own = [part for part in kept if part is not None]
    if len(own) < len(kept):
        return None

    def init(params: Params, prompts: TokenBatch, max_new_tokens: int) -> CombinedPrefix:
        each = zip(own, params_of(params), strict=True)
        states = tuple(part.init(p, prompts, max_new_tokens) for part, p in each)
        return CombinedPrefix(states, prompt_index(prompts))

    def score(params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]:
        each = zip(parts, own, params_of(params), state.parts, strict=True)
        shape, found, proposals = tuple(tokens.shape[:2]), [], []
        for reward, part, p, s in each:
            value, proposal = part.score(p, s, tokens, mask)
            found.append(check_values(value, shape, function=reward).reshape(-1))
            proposals.append(proposal)
        value = combine(params, jnp.stack(found), jnp.repeat(state.prompt_index, shape[1]))
        return value.reshape(shape), tuple(proposals)

    def commit(params: Params, state: State, proposal: State, choice: Choice) -> CombinedPrefix:
        each = zip(own, params_of(params), state.parts, proposal, strict=True)
        parts = tuple(part.commit(p, s, q, choice) for part, p, s, q in each)
        return CombinedPrefix(parts, state.prompt_index)

    return PrefixReward(init, score, commit)

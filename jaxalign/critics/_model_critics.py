"""What critics that read a model share: a scalar head at each candidate, and a score of every token at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from jaxalign import models
from jaxalign._arrays import at_least_float32, where_rows
from jaxalign._blocks import at, joined
from jaxalign._checks import Sized, check_model_params, check_prompt_fits
from jaxalign._parts import check_array, check_model
from jaxalign.models.blocks import Block, BlockModel, append_block, read_block, reads_blocks
from jaxalign.rewards import prefixes
from jaxalign.rewards.reading import Reading, reading_of
from jaxalign.shapes import Candidates, PerPrompt, PromptMask, PromptTokens, Scores
from jaxalign.types import (
    Array,
    CandidateModel,
    Critic,
    CriticKind,
    HostCheck,
    Params,
    Prompts,
    State,
    StepOutput,
    TokenBatch,
)

_BLOCK = 256  # candidates per pass where a scalar head scores the whole vocabulary


class CandidateCriticState(NamedTuple):
    """State and proposal of a critic that reads a scalar head at each candidate."""

    cache: State
    """The model's cache of the text so far."""
    entries: State | None = None
    """In a proposal, the keys and values of the candidates; None in a state, and where the whole vocabulary was
    scored."""
    reward: PerPrompt | None = None
    """[B], the score of the text so far, which a pad id does not change; None where the model has no such id."""
    pooled: models.Pooled | None = None
    """The hidden states of the text so far, added up, of a head that pools by the mean; None of another."""
    q: Scores | None = None
    """In a proposal, the scores of the candidates; None where `entries` or `reward` is."""
    candidates: Candidates | None = None
    """In a proposal, the candidates [B,K]; None where `hidden` is."""
    hidden: Array | None = None
    """In a proposal, the states [B,K,D] of the candidates; None where `entries` or `pooled` is."""


def _joined(before: models.Pooled, hidden: Array, tokens: Array, pad_id: int | None) -> models.Pooled:
    """The states before [B] with those of each of tokens [B,K], hidden [B,K,D]: over [B,K]."""
    own = models.pooled(hidden[..., None, :], tokens[..., None], jnp.ones((*tokens.shape, 1), bool), pad_id)
    return models.Pooled(before.total[:, None], before.number[:, None]).plus(own)


class VocabularyCriticState(NamedTuple):
    """State and proposal of a critic whose model scores every token at once."""

    cache: State
    """The model's cache of the text so far."""
    q: Scores
    """[B,V], the scores of the next tokens."""
    candidates: Candidates | None = None
    """In a proposal, the candidates [B,K] that were scored; None in a state, and for the whole vocabulary."""


class VerifiedCritic(NamedTuple):
    """What a critic that scores every token at once computed of a block of tokens."""

    block: Block
    """What the model read of them."""
    q: Array
    """[B,S+1,V], the scores before the block and after each of its tokens."""
    candidates: Array | None
    """[B,S+1,K], the candidates of each; None for the whole vocabulary."""


class SteppedModel(Protocol):
    """A model that is moved token by token."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def max_length(self) -> int:
        """Longest text [tokens]."""

    def prefill(self, params: Params, tokens: PromptTokens, mask: PromptMask, capacity: int) -> tuple[Array, State]:
        """As `types.LanguageModel.prefill`."""

    def step(self, params: Params, cache: State, token: Array) -> tuple[Array, State]:
        """As `types.LanguageModel.step`."""


def gather(table: Array, candidates: Candidates | None) -> Array:
    """table [B,V] at candidates [B,K], or whole."""
    return table if candidates is None else jnp.take_along_axis(table, candidates, axis=-1)


def chosen_token(candidates: Candidates | None, choice: Array) -> Array:
    """The token [B] that choice [B] stands for: the choice itself without candidates; -1 stays -1."""
    if candidates is None:
        return choice
    picked = jnp.take_along_axis(candidates, jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(choice < 0, -1, picked)


def candidate_critic(
    name: str,
    lm: CandidateModel,
    weigh: Callable[[Array], Array] = at_least_float32,
    beta: float | None = None,
    reading: Reading | None = None,
) -> Critic:
    """A level critic that reads a scalar head at each candidate: K tokens at one position over the shared prefix.

    Over the whole vocabulary (candidates None) the tokens are scored in blocks, and the chosen one is read once more:
    neither the activations nor the keys and values of V tokens a row are ever held. A reward head is read as
    `rewards.from_model` reads the text that a candidate ends: the pad id, also where it is an EOS, has the score of the
    text before it, and an end has that of its tail. A head that pools by the mean reads it with the text so far.

    Args:
      name: of the builder, for error texts.
      lm: a model with a scalar head.
      weigh: the score of a head's value, elementwise.
      beta: the critic's own `beta`.
      reading: which label is read, and the tail; None: the only one, without a tail.

    Raises:
      ValueError: a model without a scalar head.
    """
    needs = ("vocab_size", "max_length", "head_width", "prefill", "step", "head", "candidates", "commit")
    check_model(name, lm, needs)
    read_as = reading_of(name, lm, log_weights=True) if reading is None else reading
    kept = lm if isinstance(lm, prefixes.PrefixModel) else None  # what reads several tokens after a cache
    if read_as.tail and kept is None:
        raise ValueError(f"{name}: tail: expected a model that reads segments (rewards.prefixes.PrefixModel)")
    pools = read_as.pooling == "mean"
    passes_over = pools or read_as.pad_id is not None

    def read(params: Params, hidden: Array) -> Array:
        found = lm.head(params, hidden)
        check_array(f"{name}: lm.head", found, (*hidden.shape[:-1], lm.head_width), "the labels of each hidden state")
        return weigh(found[..., read_as.label])

    def read_each(params: Params, before: models.Pooled | None, hidden: Array, tokens: Array) -> Array:
        """The scores [B,K] of tokens [B,K] after the text so far."""
        return read(params, hidden if before is None else _joined(before, hidden, tokens, read_as.pad_id).mean)

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        capacity = prompts.tokens.shape[1] + max_new_tokens
        if not passes_over:
            return CandidateCriticState(lm.prefill(params, prompts.tokens, prompts.mask, capacity)[1])
        found = prefixes.prefilled(lm, read_as, params, prompts, capacity)
        return CandidateCriticState(found.cache, reward=weigh(found.reward), pooled=found.pooled)

    def at_ends(params: Params, state: CandidateCriticState, tokens: Candidates, q: Scores) -> Scores:
        """The scores of candidates [B,K] where those that a text is not read at, and ends, have their own."""
        if state.reward is not None and read_as.pad_id is not None:
            q = jnp.where(tokens == read_as.pad_id, state.reward[:, None], q)
        if not read_as.tail or kept is None:
            return q
        ends = jnp.asarray(read_as.ends, tokens.dtype)
        each = tokens[..., None] == ends
        batch = tokens.shape[0]

        def with_tail() -> Scores:
            before = jnp.zeros(batch) if state.reward is None else state.reward
            text = jnp.broadcast_to(ends[None, :, None], (batch, len(read_as.ends), 1))
            prefix = prefixes.ModelPrefix(state.cache, before, state.pooled)
            found = prefixes.read_segments(kept, read_as, params, prefix, text, jnp.ones(text.shape, bool))[0]
            tailed = jnp.take_along_axis(weigh(found), jnp.argmax(each, axis=-1), axis=1)
            return jnp.where(each.any(axis=-1), tailed, q).astype(q.dtype)

        found: Scores = jax.lax.cond(each.any(), with_tail, lambda: q)
        return found

    def score(
        params: Params,
        rng: Array,
        state: CandidateCriticState,
        output: StepOutput,
        candidates: Candidates | None,
    ) -> tuple[Scores, State]:
        if candidates is None:
            batch, vocab = output.log_prob.shape
            width = min(_BLOCK, vocab)
            # The last block may run over the end: its surplus tokens are scored and cut.
            ids = jnp.minimum(jnp.arange(-(-vocab // width) * width, dtype=jnp.int32), vocab - 1).reshape(-1, width)

            def block(tokens: Array) -> Array:
                each = jnp.broadcast_to(tokens, (batch, width))
                return read_each(params, state.pooled, lm.candidates(params, state.cache, each)[0], each)

            q = jnp.moveaxis(jax.lax.map(block, ids), 0, 1).reshape(batch, -1)[:, :vocab]
            every = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), (batch, vocab))
            return at_ends(params, state, every, q), state
        hidden, entries = lm.candidates(params, state.cache, candidates)
        q = at_ends(params, state, candidates, read_each(params, state.pooled, hidden, candidates))
        proposal = state._replace(entries=entries, q=q if passes_over else None)
        return q, proposal._replace(candidates=candidates, hidden=hidden) if pools else proposal

    def moved(before: models.Pooled | None, hidden: Array, token: Array, choice: Array) -> models.Pooled | None:
        """The states with that of a token [B], hidden [B,D]; those before where the choice is -1."""
        if before is None:
            return None
        after = jax.tree.map(lambda x: x[:, 0], _joined(before, hidden[:, None], token[:, None], read_as.pad_id))
        found: models.Pooled = where_rows(choice < 0, before, after)
        return found

    def advance(params: Params, proposal: CandidateCriticState, choice: Array) -> State:
        before = proposal.reward
        if proposal.entries is None:  # the choice is a token of the whole vocabulary
            hidden, cache = lm.step(params, proposal.cache, choice)
            if before is None:
                return CandidateCriticState(cache)
            moves = choice >= 0 if read_as.pad_id is None else (choice >= 0) & (choice != read_as.pad_id)
            found = read_each(params, proposal.pooled, hidden[:, None], choice[:, None])[:, 0]
            pooled = moved(proposal.pooled, hidden, choice, choice)
            return CandidateCriticState(cache, reward=jnp.where(moves, found, before), pooled=pooled)
        cache = lm.commit(proposal.cache, proposal.entries, choice)
        if before is None or proposal.q is None:
            return CandidateCriticState(cache)
        place = jnp.maximum(choice, 0)[:, None]
        reward = jnp.where(choice >= 0, jnp.take_along_axis(proposal.q, place, axis=1)[:, 0], before)
        if proposal.hidden is None or proposal.candidates is None:
            return CandidateCriticState(cache, reward=reward)
        hidden = jnp.take_along_axis(proposal.hidden, place[..., None], axis=1)[:, 0]
        token = jnp.take_along_axis(proposal.candidates, place, axis=1)[:, 0]
        return CandidateCriticState(cache, reward=reward, pooled=moved(proposal.pooled, hidden, token, choice))

    return Critic(init, score, advance, "level", prompt_check(lm, len(read_as.tail), head=True), lm.vocab_size, beta)


def vocabulary_critic(
    name: str,
    lm: SteppedModel,
    read: Callable[[Params, Array], Array],
    kind: CriticKind,
    beta: float | None = None,
) -> Critic:
    """A critic whose model scores every token at once: one token a step, read(params, hidden [...,D]) -> [...,V]."""

    def table(params: Params, hidden: Array) -> Array:
        q = at_least_float32(read(params, hidden))
        check_array(f"{name}: the scores", q, (*hidden.shape[:-1], lm.vocab_size), "a score for each token")
        return q

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        capacity = prompts.tokens.shape[1] + max_new_tokens
        hidden, cache = lm.prefill(params, prompts.tokens, prompts.mask, capacity)
        return VocabularyCriticState(cache, table(params, hidden))

    def score(
        params: Params,
        rng: Array,
        state: VocabularyCriticState,
        output: StepOutput,
        candidates: Candidates | None,
    ) -> tuple[Scores, State]:
        return gather(state.q, candidates), state._replace(candidates=candidates)

    def advance(params: Params, proposal: VocabularyCriticState, choice: Array) -> State:
        hidden, cache = lm.step(params, proposal.cache, chosen_token(proposal.candidates, choice))
        return VocabularyCriticState(cache, where_rows(choice < 0, proposal.q, table(params, hidden)))

    def verify(
        params: Params,
        rng: Array,
        state: VocabularyCriticState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        del rng, outputs, choices
        hidden, block = read_block(cast(BlockModel, lm), params, state.cache, tokens, mask)
        q = table(params, hidden)
        return gather(q, candidates), VerifiedCritic(
            block, joined(state.q, q), None if candidates is None else joined(state.candidates, candidates)
        )

    def accept(params: Params, proposal: VerifiedCritic, count: Array) -> State:
        del params
        cache = append_block(cast(BlockModel, lm), proposal.block, count)
        return VocabularyCriticState(cache, *at((proposal.q, proposal.candidates), count))

    critic = Critic(init, score, advance, kind, prompt_check(lm), lm.vocab_size, beta)
    return critic._replace(verify=verify, accept=accept) if reads_blocks(lm) else critic


def prompt_check(lm: Sized, tail: int = 0, *, head: bool = False) -> HostCheck:
    """The host checks of a critic that reads the prompts with a model, and so many tokens after the response; head:
    by the model's head."""

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        check_model_params(lm, params, head=head)
        check_prompt_fits(lm, prompts, max_new_tokens + tail)

    return check

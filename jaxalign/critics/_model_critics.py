"""What critics that read a model share: a scalar head at each candidate, and a score of every token at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32, where_rows
from jaxalign._checks import Sized, check_array, check_model, check_prompt_fits
from jaxalign.shapes import Candidates, PromptMask, PromptTokens, Scores
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


class VocabularyCriticState(NamedTuple):
    """State and proposal of a critic whose model scores every token at once."""

    cache: State
    """The model's cache of the text so far."""
    q: Scores
    """[B,V], the scores of the next tokens."""
    candidates: Candidates | None = None
    """In a proposal, the candidates [B,K] that were scored; None in a state, and for the whole vocabulary."""


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
    name: str, lm: CandidateModel, weigh: Callable[[Array], Array] = at_least_float32, beta: float | None = None
) -> Critic:
    """A level critic that reads a scalar head at each candidate: K tokens at one position over the shared prefix.

    Over the whole vocabulary (candidates None) the tokens are scored in blocks, and the chosen one is read once more:
    neither the activations nor the keys and values of V tokens a row are ever held.

    Args:
      name: of the builder, for error texts.
      lm: a model with a scalar head.
      weigh: the score of a head's value, elementwise.
      beta: the critic's own `beta`.

    Raises:
      ValueError: a model without a scalar head.
    """
    check_model(name, lm, ("vocab_size", "max_length", "head_width", "prefill", "step", "head", "candidates", "commit"))
    if lm.head_width != 1:
        found = "no head" if lm.head_width == 0 else f"a head of width {lm.head_width}"
        raise ValueError(f"{name}: expected a model with a scalar head, found {found}")

    def read(params: Params, hidden: Array) -> Array:
        found = lm.head(params, hidden)
        check_array(f"{name}: lm.head", found, (*hidden.shape[:-1], 1), "one number per hidden state")
        return weigh(found[..., 0])

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        capacity = prompts.tokens.shape[1] + max_new_tokens
        return CandidateCriticState(lm.prefill(params, prompts.tokens, prompts.mask, capacity)[1])

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
                return read(params, lm.candidates(params, state.cache, jnp.broadcast_to(tokens, (batch, width)))[0])

            q = jnp.moveaxis(jax.lax.map(block, ids), 0, 1).reshape(batch, -1)[:, :vocab]
            return q, CandidateCriticState(state.cache)
        hidden, entries = lm.candidates(params, state.cache, candidates)
        return read(params, hidden), CandidateCriticState(state.cache, entries)

    def advance(params: Params, proposal: CandidateCriticState, choice: Array) -> State:
        if proposal.entries is None:  # the choice is a token of the whole vocabulary
            return CandidateCriticState(lm.step(params, proposal.cache, choice)[1])
        return CandidateCriticState(lm.commit(proposal.cache, proposal.entries, choice))

    return Critic(init, score, advance, "level", prompt_check(lm), lm.vocab_size, beta)


def vocabulary_critic(
    name: str,
    lm: SteppedModel,
    read: Callable[[Params, Array], Array],
    kind: CriticKind,
    beta: float | None = None,
) -> Critic:
    """A critic whose model scores every token at once: one token a step, read(params, hidden [B,D]) -> [B,V]."""

    def table(params: Params, hidden: Array) -> Array:
        q = at_least_float32(read(params, hidden))
        check_array(f"{name}: the scores", q, (hidden.shape[0], lm.vocab_size), "a score for each token")
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

    return Critic(init, score, advance, kind, prompt_check(lm), lm.vocab_size, beta)


def prompt_check(lm: Sized) -> HostCheck:
    """The host checks of a critic that reads the prompts with a model."""

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        check_prompt_fits(lm, prompts, max_new_tokens)

    return check

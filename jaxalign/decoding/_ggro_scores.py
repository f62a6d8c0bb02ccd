"""A reward and its token gradient as one scorer of segments, whose state moves with the text that is accepted."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.rewards import prefixes
from jaxalign.rewards.token_scores import TokenScore
from jaxalign.shapes import Candidates, Choice
from jaxalign.types import Array, Params, PrefixTokenGradient, Reward, State, TokenBatch


class ScorerInit(Protocol):
    """The state of the prompts alone."""

    def __call__(self, params: Params, prompts: TokenBatch, max_new_tokens: int) -> State: ...


class ScorerScore(Protocol):
    """(reward [B], first-order scores [B,k] of the choices in place of the first token, proposal) of segments [B,S];
    choices [B,k], more []: False gives zeros for the scores."""

    def __call__(
        self, params: Params, state: State, tokens: Array, mask: Array, choices: Candidates, more: Array
    ) -> tuple[Array, Array, State]: ...


class ScorerCommit(Protocol):
    """The state after choice [B]: 0 accepts the segment, −1 does not."""

    def __call__(self, params: Params, state: State, proposal: State, choice: Choice) -> State: ...


class Scorer(NamedTuple):
    """What GGRO asks of a segment, params {"reward", "gradient"}."""

    init: ScorerInit
    """init(params, prompts, max_new_tokens) -> state."""
    score: ScorerScore
    """score(params, state, tokens [B,S], mask [B,S], choices [B,k], more []) -> (reward, scores, proposal)."""
    commit: ScorerCommit
    """commit(params, state, proposal, choice [B]) -> state."""


class _States(NamedTuple):
    reward: State
    gradient: State


def scorer_of(reward: Reward | None, gradient: TokenScore) -> Scorer:
    """The scorer of a reward and its token gradient; reward None: the one behind the gradient, in one pass with it."""
    slope = prefixes.prefix_token_gradient(gradient)
    if reward is None:

        def init_one(params: Params, prompts: TokenBatch, max_new_tokens: int) -> State:
            return slope.reward.init(params["gradient"], prompts, max_new_tokens)

        def score_one(
            params: Params, state: State, tokens: Array, mask: Array, choices: Candidates, more: Array
        ) -> tuple[Array, Array, State]:
            return _both(slope, params["gradient"], state, tokens, mask, choices, more)

        def commit_one(params: Params, state: State, proposal: State, choice: Choice) -> State:
            return slope.reward.commit(params["gradient"], state, proposal, choice)

        return Scorer(init_one, score_one, commit_one)
    value = prefixes.prefix_reward(reward)

    def init(params: Params, prompts: TokenBatch, max_new_tokens: int) -> State:
        return _States(
            value.init(params["reward"], prompts, max_new_tokens),
            slope.reward.init(params["gradient"], prompts, max_new_tokens),
        )

    def score(
        params: Params, state: State, tokens: Array, mask: Array, choices: Candidates, more: Array
    ) -> tuple[Array, Array, State]:
        found, proposal = value.score(params["reward"], state.reward, tokens[:, None], mask[:, None])
        _, scores, other = _both(slope, params["gradient"], state.gradient, tokens, mask, choices, more)
        return at_least_float32(found[:, 0]), scores, _States(proposal, other)

    def commit(params: Params, state: State, proposal: State, choice: Choice) -> State:
        return _States(
            value.commit(params["reward"], state.reward, proposal.reward, choice),
            slope.reward.commit(params["gradient"], state.gradient, proposal.gradient, choice),
        )

    return Scorer(init, score, commit)


def _both(
    slope: PrefixTokenGradient,
    params: Params,
    state: State,
    tokens: Array,
    mask: Array,
    choices: Candidates,
    more: Array,
) -> tuple[Array, Array, State]:
    """(reward [B], scores [B,k], proposal); without the pass back where `more` is False."""

    def with_scores() -> tuple[Array, Array, State]:
        found, scores, proposal = slope.score(params, state, tokens, mask, choices)
        return at_least_float32(found), at_least_float32(scores), proposal

    kind = jax.eval_shape(with_scores)[1]

    def alone() -> tuple[Array, Array, State]:
        found, proposal = slope.reward.score(params, state, tokens[:, None], mask[:, None])
        return at_least_float32(found[:, 0]), jnp.zeros(kind.shape, kind.dtype), proposal

    found: tuple[Array, Array, State] = jax.lax.cond(more, with_scores, alone)
    return found

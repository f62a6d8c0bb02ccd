"""The prefix form of a reward that reads whole texts: the prefix is kept as tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxalign import mdp
from jaxalign._arrays import repeat_rows, write
from jaxalign.prompts import prompt_index
from jaxalign.rewards.token_scores import TokenScore
from jaxalign.rewards.values import call_reward, check_values
from jaxalign.shapes import (
    Candidates,
    Choice,
    ResponseMask,
    ResponseTokens,
    RewardValues,
    Scores,
    TextLength,
    TextMask,
    TextTokens,
)
from jaxalign.types import Array, Params, PrefixReward, PrefixTokenGradient, Reward, State, TokenBatch


class TextPrefix(NamedTuple):
    """State of a reward that reads whole texts: the prefix as tokens."""

    prompts: TokenBatch
    """The prompts [N,P], with their index."""
    response: ResponseTokens
    """[N,T], the accepted tokens, zeros after them."""
    length: TextLength
    """[N], accepted tokens."""


class TextProposal(NamedTuple):
    """M segments that were scored as whole texts."""

    tokens: Array
    """[N,M,S]."""
    mask: Array
    """[N,M,S] bool."""


def _start(params: Params, prompts: TokenBatch, max_new_tokens: int) -> TextPrefix:
    del params
    batch = prompts.tokens.shape[0]
    given = TokenBatch(prompts.tokens, prompts.mask.astype(bool), prompt_index(prompts))
    return TextPrefix(given, jnp.zeros((batch, max_new_tokens), jnp.int32), jnp.zeros(batch, jnp.int32))


def _written(state: TextPrefix, tokens: Array, mask: Array) -> TextPrefix:
    """The state after segments [N,S]; what lies beyond the room is dropped."""
    room = state.response.shape[1]
    place = jnp.where(mask, state.length[:, None] + jnp.cumsum(mask, axis=1) - 1, room)
    length = state.length + mask.sum(axis=1, dtype=jnp.int32)
    return state._replace(response=write(state.response, place, tokens), length=length)


def _text(state: TextPrefix) -> tuple[TextTokens, TextMask, TextLength]:
    real = jnp.arange(state.response.shape[1]) < state.length[:, None]
    return mdp.concatenate(state.prompts, state.response, real)


def _keep(params: Params, state: State, proposal: State, choice: Choice) -> TextPrefix:
    del params
    pick = jnp.maximum(choice, 0)[:, None, None]
    tokens, mask = (jnp.take_along_axis(x, pick, axis=1)[:, 0] for x in (proposal.tokens, proposal.mask))
    return _written(state, tokens, mask & (choice >= 0)[:, None])


def whole_text(reward: Reward) -> PrefixReward:
    """Builds the prefix form of any Reward: the prefix is kept as tokens, and each text is read whole."""

    def score(params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]:
        batch, count, width = tokens.shape
        texts = _written(repeat_rows(state, count), tokens.reshape(-1, width), mask.reshape(-1, width))
        index = prompt_index(texts.prompts)
        found = call_reward(reward, params, *_text(texts), index).reshape(batch, count)
        return found, TextProposal(tokens, mask)

    return PrefixReward(_start, score, _keep)


def whole_text_token_gradient(gradient: TokenScore) -> PrefixTokenGradient:
    """Builds the prefix form of any token gradient; its reward is the one that is differentiated, zeros where it has
    none."""
    reward = getattr(gradient, "reward", None)
    with_reward = getattr(gradient, "with_reward", None)

    def no_reward(params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]:
        return jnp.zeros(tokens.shape[:2]), TextProposal(tokens, mask)

    def score(
        params: Params, state: State, tokens: ResponseTokens, mask: ResponseMask, candidates: Candidates
    ) -> tuple[RewardValues, Scores, State]:
        text = _text(_written(state, tokens, mask))
        position = (text[2] + state.length).astype(jnp.int32)
        proposal = TextProposal(tokens[:, None], mask[:, None])
        if with_reward is None:
            value, scores = jnp.zeros(tokens.shape[0]), gradient(params, *text, position, candidates)
        else:
            value, scores = with_reward(params, *text, position, candidates)
        shape = tuple(candidates.shape)
        value = check_values(value, shape[:1], function=gradient)
        return value, check_values(scores, shape, function=gradient), proposal

    return PrefixTokenGradient(PrefixReward(_start, no_reward, _keep) if reward is None else whole_text(reward), score)

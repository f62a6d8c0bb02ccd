"""The token-level decision process of generation, as pure functions.

A state is the prompt and the tokens drawn so far; a token is appended deterministically; the reward of the whole
response is paid once, at its end.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32, write
from jaxalign.shapes import (
    NextToken,
    Numbers,
    PerPrompt,
    PerPromptFlag,
    ResponseMask,
    ResponseTokens,
    TextLength,
    TextMask,
    TextTokens,
    TokenIds,
    TokenIndex,
    TokenMask,
)
from jaxalign.types import Array, TokenBatch

__all__ = [
    "State",
    "compact",
    "concatenate",
    "initial_state",
    "last_index",
    "response_mask",
    "response_part",
    "terminal_reward",
    "trajectory_log_prob",
    "transition",
]


def last_index(mask: TokenMask) -> TokenIndex:
    """Gives the index of the last True of each row, where argmax of a mask would give the first.

    Args:
      mask: [...,L] bool.

    Returns:
      [...] int32; −1 for a row without a True.
    """
    positions = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    return jnp.where(mask, positions, -1).max(axis=-1)


def compact(tokens: TextTokens, mask: TextMask) -> tuple[TextTokens, TextMask]:
    """Moves the real tokens of each row to the front, in their order.

    Padding may be left, right or in between; lengths come from the mask, never from a token id.

    Args:
      tokens: [B,L] ids.
      mask: [B,L], True on real tokens.

    Returns:
      (tokens, mask) [B,L], right-padded with zeros.
    """
    chex.assert_rank([tokens, mask], 2)
    chex.assert_equal_shape([tokens, mask])
    mask = mask.astype(bool)
    length = tokens.shape[1]
    # Padding is sent to the slot past the end, where the scatter drops it.
    target = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, length)
    moved = write(jnp.zeros_like(tokens), target, tokens)
    return moved, jnp.arange(length) < mask.sum(axis=1, keepdims=True)


def response_mask(tokens: TokenIds, eos_ids: tuple[int, ...]) -> TokenMask:
    """Gives the mask of a response in drawn tokens: True up to and including the first EOS.

    Args:
      tokens: [...,T] ids.
      eos_ids: the ids that end a response; () for none.

    Returns:
      [...,T] bool; all True in a row without an EOS.
    """
    if not eos_ids:
        return jnp.ones(tokens.shape, bool)
    eos = (tokens[..., None] == jnp.asarray(eos_ids, tokens.dtype)).any(axis=-1)
    return jnp.cumsum(eos, axis=-1) - eos == 0


def response_part(mask: TextMask, prompt_length: TextLength) -> TextMask:
    """Gives the response's positions in rows of prompt and response, mask & (cumsum(mask) > prompt_length).

    Args:
      mask: [N,L], True on real tokens, under either padding.
      prompt_length: [N], real tokens of the prompt.

    Returns:
      [N,L] bool.
    """
    mask = mask.astype(bool)
    return mask & (jnp.cumsum(mask, axis=-1) > prompt_length[..., None])


def concatenate(
    prompts: TokenBatch, tokens: ResponseTokens, mask: ResponseMask
) -> tuple[TextTokens, TextMask, TextLength]:
    """Joins prompts and responses into whole texts.

    Args:
      prompts: [B,P], under either padding.
      tokens: [B,T], ids of the responses.
      mask: [B,T], True on real tokens.

    Returns:
      (tokens [B,P+T], mask [B,P+T], prompt_length [B]), right-padded; prompt_length counts real prompt tokens.
    """
    joined = jnp.concatenate([prompts.tokens, tokens], axis=1)
    joined_mask = jnp.concatenate([prompts.mask.astype(bool), mask.astype(bool)], axis=1)
    return *compact(joined, joined_mask), prompts.mask.astype(jnp.int32).sum(axis=1)


class State(NamedTuple):
    """Where each row of a batch stands."""

    tokens: TextTokens
    """[B,L] ids, right-padded; L is the prompts' width and the room for the response."""
    length: TextLength
    """[B], real tokens so far, the prompt's included."""
    prompt_length: TextLength
    """[B], real tokens of the prompt."""
    done: PerPromptFlag
    """[B]: an EOS was drawn, or the limit is reached."""


def initial_state(prompts: TokenBatch, max_new_tokens: int) -> State:
    """Gives the state of prompts alone, with room for their responses.

    Args:
      prompts: [B,P], under either padding.
      max_new_tokens: T >= 1, the room that each response gets.

    Returns:
      A State with tokens [B,P+T].

    Raises:
      ValueError: max_new_tokens below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    tokens, mask = compact(prompts.tokens, prompts.mask)
    length = mask.sum(axis=1).astype(jnp.int32)
    room = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)))
    return State(room, length, length, jnp.zeros(length.shape, bool))


def transition(state: State, token: NextToken, *, eos_ids: tuple[int, ...], max_new_tokens: int) -> State:
    """Appends a token to each row: s_{t+1} = [s_t, z].

    Rows that are done, and rows with token −1, stay as they are. A row is done when it draws an EOS or its
    max_new_tokens-th token.

    Args:
      state: where the rows stand.
      token: [B] ids; −1 for none.
      eos_ids: the ids that end a response.
      max_new_tokens: T, the limit of a response, its EOS included.

    Returns:
      The next State.
    """
    move = ~state.done & (token >= 0)
    slot = jnp.where(move, state.length, state.tokens.shape[1])
    tokens = write(state.tokens, slot, token)
    length = state.length + move
    eos = (token[:, None] == jnp.asarray(eos_ids, token.dtype)).any(axis=-1) if eos_ids else jnp.zeros_like(move)
    full = length - state.prompt_length >= max_new_tokens
    return State(tokens, length, state.prompt_length, state.done | (move & (eos | full)))


def terminal_reward(
    before: State,
    *,
    after: State,
    reward: PerPrompt,
    eos_ids: tuple[int, ...],
    truncation: Literal["score", "zero"],
) -> PerPrompt:
    """Gives the reward paid by one transition: that of the whole response on the step that ends it, 0 on all others.

    Args:
      before: the state before the transition.
      after: the state after it.
      reward: [B], of the whole responses.
      eos_ids: the ids that end a response.
      truncation: what a response without an EOS earns: "score" its reward, "zero" nothing.

    Returns:
      [B], in units of reward.

    Raises:
      ValueError: another truncation.
    """
    ends = after.done & ~before.done
    if truncation == "zero":
        last = jnp.take_along_axis(after.tokens, jnp.maximum(after.length - 1, 0)[:, None], axis=1)
        ends &= (last == jnp.asarray(eos_ids, last.dtype)).any(axis=-1) if eos_ids else False
    elif truncation != "score":
        raise ValueError(f"truncation: expected 'score' or 'zero', found {truncation!r}")
    return jnp.where(ends, at_least_float32(reward), 0)


def trajectory_log_prob(log_prob: Array, *, mask: TokenMask) -> Numbers:
    """Gives the log-probability of whole responses, log pi(y|x) = Σ_t m_t·log pi(y_t|x,y_<t).

    Args:
      log_prob: [...,T], of each token, in nats; entries that are masked out may hold anything.
      mask: [...,T], EOS included.

    Returns:
      [...], in nats, at least float32.
    """
    chex.assert_equal_shape([log_prob, mask])
    return jnp.where(mask, at_least_float32(log_prob), 0).sum(axis=-1)

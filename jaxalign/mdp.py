"""The token-level decision process of generation, as pure functions.

A state is the prompt and the tokens drawn so far; a token is appended deterministically; the reward of the whole
response is paid once, at its end.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.types import Array, TokenBatch


def last_index(mask: Array) -> Array:
    """Index [...] of the last True of mask [...,L]; -1 where there is none. (argmax of a mask is its FIRST True.)"""
    positions = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    return jnp.where(mask, positions, -1).max(axis=-1)


def compact(tokens: Array, mask: Array) -> tuple[Array, Array]:
    """The real tokens of each row moved to the front in their order, zeros after: (tokens, mask) [B,L], right-padded.

    Any padding, left, right or in between; lengths come from the mask, never from a token id.
    """
    chex.assert_rank([tokens, mask], 2)
    chex.assert_equal_shape([tokens, mask])
    mask = mask.astype(bool)
    batch, length = tokens.shape
    # Padding is sent to the slot past the end, where the scatter drops it.
    target = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, length)
    rows = jnp.arange(batch)[:, None]
    moved = jnp.zeros_like(tokens).at[rows, target].set(tokens, mode="drop")
    return moved, jnp.arange(length) < mask.sum(axis=1, keepdims=True)


def response_mask(tokens: Array, eos_ids: tuple[int, ...]) -> Array:
    """True up to and including the first EOS of tokens [...,T]; eos_ids is a set of ids."""
    if not eos_ids:
        return jnp.ones(tokens.shape, bool)
    eos = (tokens[..., None] == jnp.asarray(eos_ids, tokens.dtype)).any(axis=-1)
    return jnp.cumsum(eos, axis=-1) - eos == 0


def response_part(mask: Array, prompt_length: Array) -> Array:
    """The response's positions [N,L] of joined rows: mask & (cumsum(mask) > prompt_length), under either padding."""
    mask = mask.astype(bool)
    return mask & (jnp.cumsum(mask, axis=-1) > prompt_length[..., None])


def concatenate(prompts: TokenBatch, tokens: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Prompts [B,P] followed by responses [B,T], right-padded: (tokens [B,P+T], mask [B,P+T], prompt_length [B])."""
    joined = jnp.concatenate([prompts.tokens, tokens], axis=1)
    joined_mask = jnp.concatenate([prompts.mask.astype(bool), mask.astype(bool)], axis=1)
    return *compact(joined, joined_mask), prompts.mask.astype(jnp.int32).sum(axis=1)


class State(NamedTuple):
    """tokens [B,L] right-padded; length, prompt_length [B]; done [B]: EOS was drawn, or L is reached."""

    tokens: Array
    length: Array
    prompt_length: Array
    done: Array


def initial_state(prompts: TokenBatch, max_new_tokens: int) -> State:
    """The prompts, with room for max_new_tokens >= 1 each."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    tokens, mask = compact(prompts.tokens, prompts.mask)
    length = mask.sum(axis=1).astype(jnp.int32)
    room = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)))
    return State(room, length, length, jnp.zeros(length.shape, bool))


def transition(state: State, token: Array, *, eos_ids: tuple[int, ...], max_new_tokens: int) -> State:
    """s_{t+1} = [s_t, z]. Rows that are done, and rows with token -1, stand still. A row is done when it draws an EOS
    or its max_new_tokens-th token."""
    move = ~state.done & (token >= 0)
    slot = jnp.where(move, state.length, state.tokens.shape[1])
    tokens = state.tokens.at[jnp.arange(token.shape[0]), slot].set(token, mode="drop")
    length = state.length + move
    eos = (token[:, None] == jnp.asarray(eos_ids, token.dtype)).any(axis=-1) if eos_ids else jnp.zeros_like(move)
    full = length - state.prompt_length >= max_new_tokens
    return State(tokens, length, state.prompt_length, state.done | (move & (eos | full)))


def terminal_reward(
    before: State,
    *,
    after: State,
    reward: Array,
    eos_ids: tuple[int, ...],
    truncation: Literal["score", "zero"],
) -> Array:
    """The reward [B] paid by one transition: reward [B] of the response on the step that ends it, 0 on all others, so
    that it is paid once. `truncation` names what a response without EOS earns: "score" its reward, "zero" nothing.
    """
    ends = after.done & ~before.done
    if truncation == "zero":
        last = jnp.take_along_axis(after.tokens, jnp.maximum(after.length - 1, 0)[:, None], axis=1)
        ends &= (last == jnp.asarray(eos_ids, last.dtype)).any(axis=-1) if eos_ids else False
    elif truncation != "score":
        raise ValueError(f"truncation: expected 'score' or 'zero', found {truncation!r}")
    return jnp.where(ends, at_least_float32(reward), 0)


def trajectory_log_prob(log_prob: Array, *, mask: Array) -> Array:
    """log pi(y|x) = Σ_t m_t·log pi(y_t|x,y_<t), [...] from [...,T]; at least float32, whatever is masked out."""
    chex.assert_equal_shape([log_prob, mask])
    return jnp.where(mask, at_least_float32(log_prob), 0).sum(axis=-1)

"""Rewards that keep a prefix: what a `PrefixReward` is for a reward model, for a combination, and for any function.

A decoder that scores many texts with one beginning reads the beginning once. `of(reward)` is the one way to ask: the
reward's own `prefix`, or a form that keeps the text and reads it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import mdp
from jaxalign._arrays import at_least_float32, repeat_rows
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, Params, PrefixGain, PrefixReward, Reward, State, TokenBatch


def of(reward: Reward) -> PrefixReward:
    """The reward's own form that keeps a prefix, or `whole_text`."""
    own = getattr(reward, "prefix", None)
    return whole_text(reward) if own is None else own


def of_gain(gain: Callable[..., Array]) -> PrefixGain:
    """The same of a gain; one that reads whole texts has no reward of its own (zeros)."""
    own = getattr(gain, "prefix", None)
    return whole_text_gain(gain) if own is None else own


# A reward model -------------------------------------------------------------------------------------------------------


def of_model(lm: Any) -> PrefixReward:
    """A reward model's scalar at the last real token: the prefix is in its cache, and a segment alone is read, in as
    narrow a pass as holds it (`_sizes`)."""

    def score(params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]:
        return _sized(_read, False, lm, params, state, tokens, mask)

    return PrefixReward(lambda *arguments: _init(lm, *arguments), score, lambda *arguments: _commit(lm, *arguments))


def gain_of_model(lm: Any) -> PrefixGain:
    """The gain of `rewards.embedding_gain`: nothing before the segment depends on its first token, so the backward
    pass, too, goes through the segment alone."""

    def score(params: Params, state: State, tokens: Array, mask: Array, candidates: Array) -> Any:
        segment = (tokens[:, None], mask[:, None])
        found, gradient, proposal = _sized(_read_and_slope, True, lm, params, state, *segment)
        table = at_least_float32(lm.embed(params, candidates))
        return found[:, 0], jnp.einsum("nkd,nd->nk", table, gradient), proposal

    return PrefixGain(of_model(lm), score)


def _init(lm: Any, params: Params, prompts: TokenBatch, max_new_tokens: int) -> State:
    capacity = prompts.tokens.shape[1] + max_new_tokens
    hidden, cache = lm.prefill(params, prompts.tokens, prompts.mask.astype(bool), capacity)
    return {"cache": cache, "reward": lm.head(params, hidden)[:, 0]}


def _commit(lm: Any, params: Params, state: State, proposal: State, choice: Array) -> State:
    del params
    cache = lm.append(state["cache"], proposal["entries"], proposal["mask"], choice)
    picked = jnp.take_along_axis(proposal["reward"], jnp.maximum(choice, 0)[:, None], axis=1)[:, 0]
    return {"cache": cache, "reward": jnp.where(choice >= 0, picked, state["reward"])}


def _read(lm: Any, params: Params, state: State, tokens: Array, mask: Array, packed: int, **options: Any) -> Any:
    """(reward [N,M], proposal) of segments [N,M,S] in a pass of `packed` tokens."""
    last = mdp.last_index(mask)
    hidden, entries = lm.segments(params, state["cache"], tokens, mask, packed=packed, at=last, **options)
    found = jnp.where(last >= 0, lm.head(params, hidden)[..., 0], state["reward"][:, None])
    return found, {"entries": entries, "mask": mask, "reward": found}


def _read_and_slope(lm: Any, params: Params, state: State, tokens: Array, mask: Array, packed: int) -> Any:
    """(reward [N,1], its gradient [N,D] in the embedding of the first token, proposal) of segments [N,1,S]."""
    embeddings = lm.embed(params, jnp.where(mask, tokens, 0))

    def total(e: Array) -> Any:
        given = embeddings.at[:, 0, 0].set(e)
        found, proposal = _read(lm, params, state, tokens, mask, packed, embeddings=given)
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


def _sized(
    read: Callable[..., Any], ragged: bool, lm: Any, params: Params, state: State, tokens: Array, mask: Array
) -> Any:
    """read(lm, params, state, tokens, mask, packed) in the first of the `_sizes` that holds the real tokens."""
    rows, width = mask.shape[0] * mask.shape[1], mask.shape[2]
    sizes, last = _sizes(rows, width, ragged=ragged), mdp.last_index(mask)

    def at(columns: int, packed: int) -> Callable[[], Any]:
        def run() -> Any:
            *found, proposal = read(lm, params, state, tokens[..., :columns], mask[..., :columns], packed)
            room = ((0, 0), (0, 0), (0, 0), (0, width - columns), (0, 0))
            entries = jax.tree.map(lambda x: jnp.pad(x, room), proposal["entries"])
            return (*found, proposal | {"entries": entries, "mask": mask})

        return run

    if len(sizes) == 1:
        return at(*sizes[0])()
    longest, total = last.max() + 1, mask.sum()
    fits = jnp.stack([(longest <= columns) & (total <= packed) for columns, packed in sizes])
    return jax.lax.switch(jnp.argmax(fits), [at(*size) for size in sizes])


# Any function ---------------------------------------------------------------------------------------------------------


def _start(params: Params, prompts: TokenBatch, max_new_tokens: int) -> State:
    del params
    batch = prompts.tokens.shape[0]
    return {
        "prompts": TokenBatch(prompts.tokens, prompts.mask.astype(bool), prompt_index(prompts)),
        "response": jnp.zeros((batch, max_new_tokens), jnp.int32),
        "length": jnp.zeros(batch, jnp.int32),
    }


def _written(state: State, tokens: Array, mask: Array) -> State:
    """The state after segments [N,S]; what lies beyond the room is dropped."""
    room, rows = state["response"].shape[1], jnp.arange(tokens.shape[0])[:, None]
    place = jnp.where(mask, state["length"][:, None] + jnp.cumsum(mask, axis=1) - 1, room)
    response = state["response"].at[rows, place].set(tokens, mode="drop")
    return state | {"response": response, "length": state["length"] + mask.sum(axis=1, dtype=jnp.int32)}


def _text(state: State) -> tuple[Array, Array, Array]:
    real = jnp.arange(state["response"].shape[1]) < state["length"][:, None]
    return mdp.concatenate(state["prompts"], state["response"], real)


def _keep(params: Params, state: State, proposal: State, choice: Array) -> State:
    del params
    pick = jnp.maximum(choice, 0)[:, None, None]
    tokens, mask = (jnp.take_along_axis(proposal[name], pick, axis=1)[:, 0] for name in ("tokens", "mask"))
    return _written(state, tokens, mask & (choice >= 0)[:, None])


def whole_text(reward: Reward) -> PrefixReward:
    """Of any Reward: the prefix is kept as tokens, and each text is read whole."""

    def score(params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]:
        batch, count, width = tokens.shape
        texts = _written(repeat_rows(state, count), tokens.reshape(-1, width), mask.reshape(-1, width))
        found = reward(params, *_text(texts), texts["prompts"].index).reshape(batch, count)
        return found, {"tokens": tokens, "mask": mask}

    return PrefixReward(_start, score, _keep)


def whole_text_gain(gain: Callable[..., Array]) -> PrefixGain:
    """The same of any gain; its reward is that behind it, zeros where it has none."""
    reward = getattr(gain, "reward", None)
    with_reward = getattr(gain, "with_reward", None)

    def none(params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]:
        return jnp.zeros(tokens.shape[:2]), {"tokens": tokens, "mask": mask}

    def score(params: Params, state: State, tokens: Array, mask: Array, candidates: Array) -> Any:
        text = _text(_written(state, tokens, mask))
        position = (text[2] + state["length"]).astype(jnp.int32)
        proposal = {"tokens": tokens[:, None], "mask": mask[:, None]}
        if with_reward is None:
            return jnp.zeros(tokens.shape[0]), gain(params, *text, position, candidates), proposal
        return *with_reward(params, *text, position, candidates), proposal

    return PrefixGain(PrefixReward(_start, none, _keep) if reward is None else whole_text(reward), score)


# Combinations ---------------------------------------------------------------------------------------------------------


def combined(
    parts: Sequence[Reward],
    params_of: Callable[[Params], Sequence[Params]],
    combine: Callable[[Params, Array, Array], Array],
) -> PrefixReward | None:
    """combine(params, rewards [m,N], index [N]) -> [N] of the parts; None where one of them keeps no prefix."""
    kept = [getattr(part, "prefix", None) for part in parts]
    own = [part for part in kept if part is not None]
    if len(own) < len(kept):
        return None

    def init(params: Params, prompts: TokenBatch, max_new_tokens: int) -> State:
        each = zip(own, params_of(params), strict=True)
        states = tuple(part.init(p, prompts, max_new_tokens) for part, p in each)
        return {"parts": states, "index": prompt_index(prompts)}

    def score(params: Params, state: State, tokens: Array, mask: Array) -> tuple[Array, State]:
        each = zip(own, params_of(params), state["parts"], strict=True)
        found, proposals = zip(*(part.score(p, s, tokens, mask) for part, p, s in each), strict=True)
        flat = jnp.stack([at_least_float32(value).reshape(-1) for value in found])
        value = combine(params, flat, jnp.repeat(state["index"], tokens.shape[1]))
        return value.reshape(tokens.shape[:2]), proposals

    def commit(params: Params, state: State, proposal: State, choice: Array) -> State:
        each = zip(own, params_of(params), state["parts"], proposal, strict=True)
        return state | {"parts": tuple(part.commit(p, s, q, choice) for part, p, s, q in each)}

    return PrefixReward(init, score, commit)

"""Tables as Policies, Critics and Rewards: every decoder runs on a tree, beside its exact law.

A table is shared by all prompts, or holds one more axis in front that the prompt's index looks up. Only the response
counts: prompts are any tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign import mdp
from jaxalign.tree.structure import Tree
from jaxalign.types import (
    Array,
    Critic,
    Params,
    Policy,
    Reward,
    State,
    StepOutput,
    TokenBatch,
    at_least_float32,
    prompt_index,
)


def prompts(batch: int, *, length: int = 1) -> TokenBatch:
    """`batch` dummy prompts."""
    return TokenBatch(jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool))


def _row(tree: Tree, params: Array, state: State) -> Array:
    """The table's row [B,V] of each state; states past the end (after EOS, or at the horizon) read the root's."""
    node = jnp.where(state["node"] < tree.num_states, state["node"], 0)
    table = at_least_float32(params)
    return table[node] if table.ndim == 2 else table[state["index"], node]


def _start(batch: TokenBatch) -> State:
    index = prompt_index(batch)
    return {"node": jnp.zeros(index.shape, jnp.int32), "index": index}


def _move(tree: Tree, state: State, token: Array) -> State:
    child = jnp.minimum(state["node"], tree.num_states) * tree.vocab_size + 1 + token
    return {**state, "node": jnp.where(token < 0, state["node"], jnp.minimum(child, tree.num_states)).astype(jnp.int32)}


def policy(tree: Tree) -> Policy:
    """Policy whose params are a table of log-probabilities (or logits) [S,V], or [N,S,V] by the prompt's index."""

    def output(params: Array, state: State) -> StepOutput:
        log_prob = jax.nn.log_softmax(_row(tree, params, state))
        return StepOutput(log_prob, log_prob, jnp.zeros(log_prob.shape[:1], log_prob.dtype))

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> tuple[State, StepOutput]:
        state = _start(prompts)
        return state, output(params, state)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        state = _move(tree, state, token)
        return state, output(params, state)

    return Policy(init, step, None, _check_tables(tree), tree.vocab_size)


def critic(tree: Tree, kind: Literal["level", "increment"]) -> Critic:
    """Critic whose params are a table q(s,z) [S,V], or [N,S,V] by the prompt's index."""

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        return _start(prompts)

    def score(params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None) -> Any:
        q = _row(tree, params, state)
        if candidates is None:
            return q, state
        return jnp.take_along_axis(q, candidates, axis=-1), {**state, "candidates": candidates}

    def advance(params: Params, proposal: State, choice: Array) -> State:
        token = choice
        if "candidates" in proposal:
            picked = jnp.take_along_axis(proposal["candidates"], jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
            token = jnp.where(choice < 0, -1, picked)
        return _move(tree, {name: proposal[name] for name in ("node", "index")}, token)

    return Critic(init, score, advance, kind, _check_tables(tree), tree.vocab_size)


def reward(tree: Tree) -> Reward:
    """Reward whose params are a table [M] over responses, or [N,M] by the prompt's index."""

    def score(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        part = mdp.response_part(mask, prompt_length)
        response, real = mdp.compact(tokens, part)
        width = max(tree.horizon - response.shape[1], 0)
        response = jnp.pad(response, ((0, 0), (0, width)))[:, : tree.horizon]
        real = jnp.pad(real, ((0, 0), (0, width)))[:, : tree.horizon]
        found = response_index(tree, response, real)
        table = at_least_float32(params)
        return table[found] if table.ndim == 1 else table[index, found]

    return score


def response_index(tree: Tree, tokens: Array, mask: Array) -> Array:
    """The number [B] of each complete response, tokens and mask [B,T] with T = horizon, right-padded."""
    node, found = jnp.zeros(tokens.shape[:1], jnp.int32), jnp.zeros(tokens.shape[:1], jnp.int32)
    leaf = jnp.asarray(tree.leaf)
    for t in range(tree.horizon):
        token = jnp.where(mask[:, t], tokens[:, t], 0)
        inside = jnp.minimum(node, tree.num_states - 1)
        found = jnp.where(mask[:, t], leaf[inside, token], found)
        node = jnp.where(mask[:, t], node * tree.vocab_size + 1 + token, node)
    return found


def _check_tables(tree: Tree) -> Any:
    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        shape = (tree.num_states, tree.vocab_size)
        if params.shape[-2:] != shape or params.ndim not in (2, 3):
            raise ValueError(f"params: expected a table of shape {shape} or (N, {shape[0]}, {shape[1]})")

    return check

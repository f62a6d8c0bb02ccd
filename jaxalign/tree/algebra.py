"""Tables as Policies, Critics and Rewards: every decoder runs on a tree, beside its exact law.

A table is shared by all prompts, or holds one more axis in front that the prompt's index looks up. Only the response
counts: prompts are any tokens. Equal trees have the same Policy, Critic and Reward, and share traces.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp
from jaxalign._arrays import at_least_float32
from jaxalign._tables import check_index
from jaxalign.prompts import prompt_index
from jaxalign.shapes import Candidates, NextToken, PromptIndex, ResponseMask, ResponseTokens, TextIndex
from jaxalign.tree.structure import Tree
from jaxalign.types import (
    Array,
    CheckedReward,
    Critic,
    HostCheck,
    Params,
    Policy,
    Reward,
    State,
    StepOutput,
    TokenBatch,
)


def prompts(batch: int, *, length: int = 1) -> TokenBatch:
    """Gives prompts for a tree, where only the response counts.

    Args:
      batch: B, how many.
      length: P, tokens of each, all 0.

    Returns:
      A TokenBatch [B,P].
    """
    return TokenBatch(jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool))


class TreeState(NamedTuple):
    """Where each row stands in a tree."""

    node: NextToken
    """[B], the state's number; that past the last one where the response has ended."""
    prompt_index: PromptIndex
    """[B], the prompt's row in its set."""


class TreeProposal(NamedTuple):
    """Where each row stands, and what may come next."""

    state: TreeState
    """Of the text so far."""
    candidates: Candidates | None
    """[B,K], the tokens that were scored; None for the whole vocabulary."""


def _check_shape(tree: Tree, table: Array) -> None:
    shape = (tree.num_states, tree.vocab_size)
    if np.ndim(table) not in (2, 3) or np.shape(table)[-2:] != shape:
        raise ValueError(
            f"params: expected a table of shape {shape} or (N, {shape[0]}, {shape[1]}), found {np.shape(table)}"
        )


def _row(tree: Tree, params: Params, state: TreeState) -> Array:
    """The table's row [B,V] of each state; states past the end (after EOS, or at the horizon) read the root's. NaN for
    a prompt's index outside the table."""
    _check_shape(tree, params)
    node = jnp.where(state.node < tree.num_states, state.node, 0)
    table = at_least_float32(params)
    if table.ndim == 2:
        return table[node]
    check_index("params", state.prompt_index, table.shape[0])
    row = jnp.where(state.prompt_index < 0, table.shape[0], state.prompt_index)
    return table.at[row, node].get(mode="fill", fill_value=jnp.nan)


def _start(batch: TokenBatch) -> TreeState:
    index = prompt_index(batch)
    return TreeState(jnp.zeros(index.shape, jnp.int32), index)


def _move(tree: Tree, state: TreeState, token: Array) -> TreeState:
    child = jnp.minimum(state.node, tree.num_states) * tree.vocab_size + 1 + token
    node = jnp.where(token < 0, state.node, jnp.minimum(child, tree.num_states)).astype(jnp.int32)
    return TreeState(node, state.prompt_index)


@functools.lru_cache(maxsize=64)
def policy(tree: Tree) -> Policy:
    """Gives the Policy of a table, which every decoder takes.

    params: log-probabilities or logits [S,V], or [N,S,V] by the prompt's index; each row is normalised.

    Args:
      tree: the tree. Equal trees give the same Policy.

    Returns:
      A Policy that ends with the tree's EOS.

    Raises:
      ValueError: where it is used: a table of another shape, a prompt's index outside it, more new tokens than the
        tree's horizon.
    """

    def output(params: Array, state: State) -> StepOutput:
        log_prob = jax.nn.log_softmax(_row(tree, params, state))
        return StepOutput(log_prob, log_prob, jnp.zeros(log_prob.shape[:1], log_prob.dtype))

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> tuple[State, StepOutput]:
        state = _start(prompts)
        return state, output(params, state)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        state = _move(tree, state, token)
        return state, output(params, state)

    eos_ids = () if tree.eos_id is None else (tree.eos_id,)
    return Policy(init, step, None, _check_tables(tree), tree.vocab_size, eos_ids)


@functools.lru_cache(maxsize=64)
def critic(tree: Tree, kind: Literal["level", "increment"]) -> Critic:
    """Gives the Critic of a table.

    params: q(s,z) [S,V], or [N,S,V] by the prompt's index.

    Args:
      tree: the tree. Equal trees give the same Critic.
      kind: "level" for a table of values V(sz), "increment" for one whose sum over the tokens is the score.

    Returns:
      A Critic of that kind.

    Raises:
      ValueError: another kind; where it is used, as `policy`.
    """

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        return _start(prompts)

    def score(
        params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None
    ) -> tuple[Array, State]:
        q = _row(tree, params, state)
        if candidates is None:
            return q, TreeProposal(state, None)
        return jnp.take_along_axis(q, candidates, axis=-1), TreeProposal(state, candidates)

    def advance(params: Params, proposal: State, choice: Array) -> State:
        token = choice
        if proposal.candidates is not None:
            picked = jnp.take_along_axis(proposal.candidates, jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
            token = jnp.where(choice < 0, -1, picked)
        return _move(tree, proposal.state, token)

    return Critic(init, score, advance, kind, _check_tables(tree), tree.vocab_size)


@functools.lru_cache(maxsize=64)
def reward(tree: Tree) -> Reward:
    """Gives the Reward of a table.

    params: the reward [M] of each response, or [N,M] by the prompt's index. The table pays whole responses only: NaN
    for one that was cut short or goes on past its end, or whose prompt's index is outside the table.

    Args:
      tree: the tree. Equal trees give the same Reward.

    Returns:
      A Reward.

    Raises:
      ValueError: where it is used: a table of another shape, a prompt's index outside it.
    """

    def score(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        response, real = mdp.compact(tokens, mdp.response_part(mask, prompt_length))
        found = response_index(tree, response, real)
        table = at_least_float32(params)
        if table.shape[-1:] != (tree.num_responses,) or table.ndim > 2:
            raise ValueError(
                f"reward: expected a table of shape ({tree.num_responses},) or (N, {tree.num_responses}), "
                f"found {table.shape}"
            )
        if table.ndim == 1:
            paid = table[jnp.maximum(found, 0)]
        else:
            # A negative index would count from the end: it is sent past the end, where there is nothing.
            row = jnp.where(index < 0, table.shape[0], index)
            paid = table.at[row, found].get(mode="fill", fill_value=jnp.nan)
        return jnp.where(found >= 0, paid, jnp.nan)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        if np.ndim(params) not in (1, 2) or np.shape(params)[-1] != tree.num_responses:
            raise ValueError(
                f"reward: expected a table of shape ({tree.num_responses},) or (N, {tree.num_responses}), "
                f"found {np.shape(params)}"
            )
        if np.ndim(params) == 2:
            check_index("reward", prompt_index(prompts), np.shape(params)[0])

    return CheckedReward(score, check, tree.vocab_size)


def response_index(tree: Tree, tokens: ResponseTokens, mask: ResponseMask) -> TextIndex:
    """Gives the number of each response in the order of `Tree.responses`.

    Args:
      tree: the tree.
      tokens: [B,T] ids, right-padded.
      mask: [B,T], EOS included.

    Returns:
      [B] int32; −1 for a response that is not complete, or holds tokens after its end or outside the vocabulary.
    """
    node, found = jnp.zeros(tokens.shape[:1], jnp.int32), jnp.full(tokens.shape[:1], -1, jnp.int32)
    leaf, past = jnp.asarray(tree.leaf), tree.num_states
    for t in range(tokens.shape[1]):
        real, token = mask[:, t], tokens[:, t]
        inside = (node < past) & (token >= 0) & (token < tree.vocab_size)
        at = jnp.where(inside, node, 0), jnp.where(inside, token, 0)
        found = jnp.where(real, jnp.where(inside, leaf[at], -1), found)
        # A response that has ended, or left the tree, has no state: one more token makes it none.
        child = jnp.where(inside & (found < 0), at[0] * tree.vocab_size + 1 + at[1], past)
        node = jnp.where(real, child, node)
    return found


def _check_tables(tree: Tree) -> HostCheck:
    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        _check_shape(tree, params)
        if max_new_tokens > tree.horizon:
            raise ValueError(
                f"max_new_tokens: expected at most the tree's horizon of {tree.horizon}, found {max_new_tokens}"
            )
        if np.ndim(params) == 3:
            check_index("params", prompt_index(prompts), np.shape(params)[0])

    return check

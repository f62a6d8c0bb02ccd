"""Several tokens of each row at once: verified by a Policy or a Critic, and the first of them accepted.

A part with `verify` and `accept` reads a block in one pass. Any other is stepped through it, and the states on the way
are kept, so that each row can go back to the one after its last accepted token. A cache to which steps only append is
kept once: going back is forgetting its last slots, which are written again before anything reads them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxalign._parts import advance_critic, called, pair, score_critic, step_policy
from jaxalign.types import Array, Critic, Params, Policy, State, StepOutput


@runtime_checkable
class Appended(Protocol):
    """A part of a state to which steps only append, as a model's cache."""

    @property
    def length(self) -> Array:
        """[B,...]: entries so far."""

    def shortened(self, length: Array) -> State:
        """What it was at a smaller length: later entries are never read before they are written again."""


class Walk(NamedTuple):
    """The states on a way of S steps: a proposal of a part that has no `verify`."""

    each: State
    """[B,S+1,...]: of every state, the first one included, what `light` keeps."""
    last: State
    """The state after the last step."""


def light(state: State) -> State:
    """What of a state has to be kept to come back to it: everything, but of what is only appended to the length."""
    return jax.tree.map(lambda x: x.length if _grows(x) else x, state, is_leaf=_grows)


def _grows(node: Any) -> bool:
    return isinstance(node, Appended)


def walked(first: State, each: State, last: State) -> Walk:
    """A Walk from the light first state, the light states after each step [S,B,...], and the last state."""
    joined = jax.tree.map(lambda a, b: jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1), first, each)
    return Walk(joined, last)


def at(table: Any, place: Array) -> Any:
    """Entries of leaves [B,S,...] at place [B] in [0, S): leaves [B,...]."""
    rows = jnp.arange(place.shape[0])
    return jax.tree.map(lambda leaf: leaf[rows, place], table)


def joined(first: Array | None, each: Array) -> Array:
    """[B,S+1,...]: the entry [B,...] before a block, and that after each of its tokens [B,S,...]."""
    assert first is not None
    return jnp.concatenate([first[:, None], each], axis=1)


def last_moved(first: Array, each: Array, moves: Array) -> Array:
    """[B,S+1]: before a block and after each of its tokens, the last entry of each [B,S] whose token moves [B,S] bool,
    or first [B] where none has."""
    start = jnp.zeros_like(moves[:, :1], jnp.int32)
    place = jnp.concatenate([start, jnp.where(moves, jnp.arange(1, moves.shape[1] + 1), 0)], axis=1)
    return jnp.take_along_axis(joined(first, each), jax.lax.cummax(place, axis=1), axis=1)


def back(walk: Walk, count: Array) -> State:
    """The state after count [B] steps of a walk."""
    structure: Any
    nodes, structure = jax.tree.flatten(walk.last, is_leaf=_grows)
    found = structure.flatten_up_to(at(walk.each, count))
    return structure.unflatten(
        [node.shortened(kept) if _grows(node) else kept for node, kept in zip(nodes, found, strict=True)]
    )


def merged(tree: Any) -> Any:
    """Leaves [B,S,...] as rows [B·S,...], for functions of one output a row."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def split(tree: Any, batch: int) -> Any:
    """Leaves [B·S,...] as [B,S,...]."""
    return jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[1:]), tree)


def merged_candidates(candidates: Array | None) -> Array | None:
    """`merged` of candidates [B,S,K], or None."""
    return None if candidates is None else merged(candidates)


def first_tokens(mask: Array, count: Array) -> Array:
    """[B,S] bool: the first count [B] of the real tokens of mask [B,S], which stand in front."""
    return mask & (jnp.arange(mask.shape[1]) < count[:, None])


# Policies -------------------------------------------------------------------------------------------------------------


def verify_policy(
    policy: Policy,
    params: Params,
    rng: Array,
    state: State,
    tokens: Array,
    mask: Array,
    below: tuple[StepOutput, State] | None = None,
) -> tuple[StepOutput, State]:
    """The outputs [B,S,...] after each of tokens [B,S], real where mask is True, and a proposal for `accept_policy`.

    Raises:
      ValueError: while tracing, a result of another shape.
    """
    if policy.verify is None:
        return _step_through(policy, params, rng, state, jnp.where(mask, tokens, -1))
    name = f"policy.verify ({called(policy.verify)})"
    given = () if below is None else (below,)
    outputs, proposal = pair(name, policy.verify(params, rng, state, tokens, mask, *given), "(StepOutput, proposal)")
    _check_outputs(name, outputs, tokens)
    return outputs, proposal


def accept_policy(policy: Policy, params: Params, proposal: State, count: Array) -> State:
    """The state after the first count [B] tokens of a proposal."""
    if isinstance(proposal, Walk):  # also where the steps of a draft are those of the policy below
        return back(proposal, count)
    if policy.accept is None:
        raise ValueError(f"policy.accept: expected a function beside policy.verify ({called(policy.verify)})")
    return policy.accept(params, proposal, count)


def _step_through(policy: Policy, params: Params, rng: Array, state: State, tokens: Array) -> tuple[StepOutput, Walk]:
    def step(state: State, xs: tuple[Array, Array]) -> tuple[State, tuple[StepOutput, State]]:
        number, token = xs
        state, output = step_policy(policy, params, jax.random.fold_in(rng, number), state, token)
        return state, (output, light(state))

    last, (outputs, each) = jax.lax.scan(step, state, (jnp.arange(tokens.shape[1]), tokens.T))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs), walked(light(state), each, last)


def _check_outputs(name: str, outputs: Any, tokens: Array) -> None:
    if not isinstance(outputs, StepOutput):
        raise ValueError(f"{name}: expected (StepOutput, proposal), found {type(outputs).__name__} in its place")
    for field, rank in (("log_prob", 3), ("log_prob_ref", 3), ("log_norm", 2)):
        shape = jnp.shape(getattr(outputs, field))
        if len(shape) != rank or shape[:2] != tokens.shape:
            expected = (*tokens.shape, "V")[:rank]
            raise ValueError(f"{name}: expected {field} of shape {expected}, found {shape}")


# Critics --------------------------------------------------------------------------------------------------------------


def verify_critic(
    critic: Critic,
    params: Params,
    rng: Array,
    state: State,
    outputs: StepOutput,
    candidates: Array | None,
    tokens: Array,
    mask: Array,
    choices: Array,
) -> tuple[Array, State]:
    """Scores [B,S,K] after each of tokens [B,S], and a proposal for `accept_critic`.

    Args:
      state: the proposal of `score` before the first token.
      outputs: of the policy below, [B,S,...].
      candidates: [B,S,K] after each token; None: the whole vocabulary.
      mask: real tokens, [B,S].
      choices: [B,S], the place of each token among the candidates before it; -1 for none.

    Raises:
      ValueError: while tracing, a result of another shape.
    """
    if critic.verify is None:
        return _score_through(critic, params, rng, state, outputs, candidates, jnp.where(mask, choices, -1))
    name = f"critic.verify ({called(critic.verify)})"
    found = critic.verify(params, rng, state, outputs, candidates, tokens, mask, choices)
    q, proposal = pair(name, found, "(q, proposal)")
    shape = outputs.log_prob.shape if candidates is None else candidates.shape
    if jnp.shape(q) != shape:
        raise ValueError(f"{name}: q: expected shape {shape}, one score per token and candidate, found {jnp.shape(q)}")
    return q, proposal


def accept_critic(critic: Critic, params: Params, proposal: State, count: Array) -> State:
    """The proposal of `score` after the first count [B] tokens of a proposal of `verify_critic`."""
    if isinstance(proposal, Walk):
        return back(proposal, count)
    if critic.accept is None:
        raise ValueError(f"critic.accept: expected a function beside critic.verify ({called(critic.verify)})")
    return critic.accept(params, proposal, count)


def _score_through(
    critic: Critic,
    params: Params,
    rng: Array,
    state: State,
    outputs: StepOutput,
    candidates: Array | None,
    choices: Array,
) -> tuple[Array, Walk]:
    def step(state: State, xs: tuple[Array, Array, StepOutput, Array | None]) -> tuple[State, tuple[Array, State]]:
        number, choice, output, offered = xs
        moved = advance_critic(critic, params, state, choice)
        q, proposal = score_critic(critic, params, jax.random.fold_in(rng, number), moved, output, offered)
        return proposal, (q, light(proposal))

    steps = choices.shape[1]
    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), (choices, outputs, candidates))
    last, (q, each) = jax.lax.scan(step, state, (jnp.arange(steps), *by_step))
    return jnp.moveaxis(q, 0, 1), walked(light(state), each, last)

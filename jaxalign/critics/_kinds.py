"""Level critics as increments, and increments as levels."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported
from jaxalign._blocks import accept_critic, at, joined, last_moved, verify_critic
from jaxalign._builders import cached
from jaxalign._parts import advance_critic, check_critic_argument, score_critic, start_critic
from jaxalign.prompts import any_prompts
from jaxalign.shapes import Candidates, PerPrompt, Scores
from jaxalign.types import Array, Critic, CriticKind, Params, Prompts, State, StepOutput


class KindState(NamedTuple):
    """State and proposal of `increment_of` and `level_of`."""

    critic: State
    """Those of the critic below."""
    text: PerPrompt
    """[B], the score of the text so far; 0 at the start."""
    next: Scores | None = None
    """In a proposal, the score [B,K] of the text with each candidate; None in a state."""


def increment_of(critic: Critic) -> Critic:
    """What each token adds to a level critic's score: q'(s,z) = q(s,z) − q of the text so far, 0 at the start.

    A tilt by it has the law and the log_norm of the tilt by the level critic. With it levels and increments add:
    `weighted_sum([increment_of(value), from_policy(policy)])` is the tilt by both.

    params: the critic's.

    Args:
      critic: a level Critic.

    Returns:
      An increment Critic for the same beta.

    Raises:
      ValueError: something that is no Critic, or an increment critic.
    """
    return _other_kind(critic, "level")


def level_of(critic: Critic) -> Critic:
    """The score of the whole text by an increment critic: q'(s,z) = q(s,z) + the sum of q over the text so far.

    A tilt by it has the law and the log_norm of the tilt by the increment critic. Pools and searches that compare whole
    texts take levels.

    params: the critic's.

    Args:
      critic: an increment Critic.

    Returns:
      A level Critic for the same beta.

    Raises:
      ValueError: something that is no Critic, or a level critic.
    """
    return _other_kind(critic, "increment")


@cached
def _other_kind(critic: Critic, kind: CriticKind) -> Critic:
    """The critic, which is of this kind, as one of the other kind."""
    check_critic_argument("critic", critic)
    if critic.kind != kind:
        raise ValueError(f"critic: expected a critic of kind {kind!r}, found {critic.kind!r}")
    sign = -1 if kind == "level" else 1

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        state = start_critic(critic, params, rng, prompts, max_new_tokens)
        return KindState(state, jnp.zeros(any_prompts(prompts).tokens.shape[0]))

    def score(
        params: Params, rng: Array, state: KindState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        q, proposal = score_critic(critic, params, rng, state.critic, output, candidates)
        q = at_least_float32(q)
        other = jnp.where(is_supported(q), q + sign * state.text[:, None], NEGATIVE).astype(q.dtype)
        return other, KindState(proposal, state.text, q if kind == "level" else other)

    def advance(params: Params, proposal: KindState, choice: Array) -> State:
        assert proposal.next is not None
        chosen = jnp.take_along_axis(proposal.next, jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
        # A text outside the support has no score to subtract: that of its last part inside stays.
        moves = (choice >= 0) & is_supported(chosen)
        state = advance_critic(critic, params, proposal.critic, choice)
        return KindState(state, jnp.where(moves, chosen, proposal.text).astype(proposal.text.dtype))

    def verify(
        params: Params,
        rng: Array,
        state: KindState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        q, inner = verify_critic(critic, params, rng, state.critic, outputs, candidates, tokens, mask, choices)
        q = at_least_float32(q)
        before = joined(state.next, q)[:, :-1]  # of the text with each candidate, or what each adds to it
        chosen = jnp.take_along_axis(before, jnp.maximum(choices, 0)[..., None], axis=-1)[..., 0]
        moves = (choices >= 0) & is_supported(chosen)  # as `advance` has it
        if kind == "level":
            text = last_moved(state.text, chosen.astype(state.text.dtype), moves)
        else:
            added = jnp.where(moves[:, 1:], chosen[:, 1:], 0)
            start = jnp.where(moves[:, :1], chosen[:, :1], state.text[:, None])
            text = joined(state.text, jnp.cumsum(jnp.concatenate([start, added], axis=1), axis=1))
        other = jnp.where(is_supported(q), q + sign * text[:, 1:, None], NEGATIVE).astype(q.dtype)
        return other, KindState(inner, text, joined(state.next, q if kind == "level" else other))

    def accept(params: Params, proposal: KindState, count: Array) -> State:
        text, following = at((proposal.text, proposal.next), count)
        return KindState(accept_critic(critic, params, proposal.critic, count), text, following)

    other_kind: CriticKind = "increment" if kind == "level" else "level"
    other = Critic(init, score, advance, other_kind, critic.check, critic.vocab_size, critic.beta)
    return other if critic.verify is None else other._replace(verify=verify, accept=accept)

"""Roll-outs of a baseline from candidate tokens, each with a random stream of its own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import is_supported, repeat_rows
from jaxalign._parts import step_policy
from jaxalign.shapes import Candidates, LogProbs, PerPrompt, PerPromptFlag, ResponseTokens, Scores, TextLength
from jaxalign.types import Array, Params, Policy, State, StepOutput


class BaselineState(NamedTuple):
    """The baseline before the next token."""

    state: State
    """Its own state."""
    log_prob: LogProbs
    """[B,V], of the next token."""


class LastScores(NamedTuple):
    """What was scored last, which holds as long as the row does not move."""

    candidates: Candidates | None
    """[B,K], None for the whole vocabulary."""
    q: Scores
    """[B,K]."""
    effective: Scores
    """[B,K], the effective number of roll-outs behind each score."""
    unmoved: PerPromptFlag | None
    """[B], True where the row has not moved since; None in a proposal, whose scores are those of its state."""


class TransferQState(NamedTuple):
    """State and proposal of `transfer_q`."""

    rewards: tuple[State, ...]
    """The prefix state of the reward, and of the baseline's reward in indirect transfer."""
    response: ResponseTokens
    """[B,T], the tokens so far."""
    length: TextLength
    """[B], their number."""
    stream: Array
    """[B,2] uint32, the row's random stream."""
    beta: PerPrompt | None
    """[B], of indirect transfer, else None."""
    baseline: BaselineState | None
    """The baseline, None where lookahead = 0."""
    scores: LastScores | None
    """None before the first score."""


class Drawn(NamedTuple):
    """What was drawn after each candidate."""

    tokens: Array
    """[B,K,n,T]."""
    mask: Array
    """[B,K,n,T]."""
    lost: Array
    """[B,K,n], True where the baseline cannot follow the candidate, or has no distribution there."""


def draw(
    baseline: Policy,
    params: Params,
    state: TransferQState,
    tokens: Array,
    known: Array,
    *,
    n: int,
    steps: int,
    eos_ids: tuple[int, ...],
) -> Drawn:
    """n roll-outs of up to `steps` tokens from each candidate [B,K], none in the rows of `known` [B].

    The width of state.response is the limit of a text. Tokens carry no gradient."""
    assert state.baseline is not None
    batch, count = tokens.shape
    limit, token = state.response.shape[1], tokens.reshape(-1)
    length, known = repeat_rows((state.length, known), count)
    ended = known | rollout.is_eos(token, eos_ids) | (length + 1 >= limit)
    # Drawn tokens carry no gradient, and the loop that draws them has none.
    model, base = jax.lax.stop_gradient((params, state.baseline))
    before, key = repeat_rows(base.state, count), step_key(state)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        return baseline.step(params, jax.random.fold_in(key, jax.random.bits(rng)), state, token)

    after, output = step_policy(baseline, model, key, before, jnp.where(ended, -1, token))
    likely = is_supported(jnp.take_along_axis(base.log_prob, tokens, axis=1)).reshape(-1)
    lost = _unmoved(~(ended | likely), before, after)
    after, output, length, ended, lost = repeat_rows((after, output, length, ended, lost), n)
    drawn = rollout.rollout(
        baseline._replace(step=step),
        model,
        jax.random.key(0),  # the rows' streams tell the draws apart
        after,
        output,
        steps=steps,
        eos_ids=eos_ids,
        finished=ended,
        rows=_streams(state, tokens, n),
        limits=limit - length - 1,
        last_step=False,
    ).completions
    lost |= jnp.isnan(drawn.log_prob).any(axis=1)
    text, mask = (x.reshape(batch, count, n, steps) for x in (drawn.tokens, drawn.mask))
    return Drawn(text, mask, lost.reshape(batch, count, n))


def step_key(state: TransferQState) -> Array:
    """A key for the baseline's own steps, another at each position."""
    words = jnp.append(state.stream[0], state.length[0].astype(jnp.uint32))
    key = jax.random.key(1)
    for i in range(3):
        key = jax.random.fold_in(key, words[i])
    return key


def _streams(state: TransferQState, tokens: Array, n: int) -> Array:
    """What names each roll-out's draws [B·K·n,5]: its prompt's stream, the position, the candidate and its number."""
    parts = (state.stream[:, 0], state.stream[:, 1], state.length)
    named = [part[:, None, None] for part in parts] + [tokens[:, :, None], jnp.arange(n)[None, None, :]]
    words = jnp.broadcast_arrays(*(part.astype(jnp.uint32) for part in named))
    return jnp.stack(words, axis=-1).reshape(-1, len(words))


def _unmoved(eligible: Array, before: State, after: State) -> Array:
    """Where `eligible` [N], whether no leaf of the row's state has changed; the states are read if any is."""

    def compare() -> Array:
        unmoved = [
            (old == new).reshape(old.shape[0], -1).all(axis=1)
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        ]
        return eligible & jnp.stack(unmoved).all(axis=0) if unmoved else eligible

    found: Array = jax.lax.cond(eligible.any(), compare, lambda: jnp.zeros_like(eligible))
    return found

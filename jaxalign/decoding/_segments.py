"""Greedy segments that end where the next token is uncertain: what GGRO chooses among."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import where_rows, write
from jaxalign._parts import step_policy
from jaxalign.decoding.stopping import SegmentRule
from jaxalign.rollout import is_eos, token_value
from jaxalign.types import Array, Params, Policy, State, StepOutput


class Text(NamedTuple):
    """The text written so far, and the policy after it."""

    state: State
    """The state of the policy after the text; before an EOS, where one was written."""
    output: StepOutput
    """The output of the policy at that state."""
    tokens: Array
    """[B,T]."""
    log_prob_ref: Array
    """[B,T] of each token under the base."""
    log_norm: Array
    """[B,T], the policy's and log pi of the token."""
    length: Array
    """[B]."""
    finished: Array
    """[B]: ended by an EOS."""
    done: Array
    """[B]: ended, by an EOS or by the limit."""


def empty(state: State, output: StepOutput, steps: int) -> Text:
    """Nothing written, room for `steps` tokens."""
    batch = output.log_prob.shape[0]
    numbers = jnp.zeros((batch, steps), output.log_prob.dtype)
    no = jnp.zeros(batch, bool)
    tokens, length = jnp.zeros((batch, steps), jnp.int32), jnp.zeros(batch, jnp.int32)
    return Text(state, output, tokens, numbers, numbers, length, no, no)


class Rules(NamedTuple):
    """Where a segment ends: before the first token, after `min_segment`, where the rule says so, unless that token is
    an EOS or the last that there is room for: those end the text."""

    rule: SegmentRule
    """A function of `stopping`."""
    threshold: Array
    """[B], the rule's [nats]."""
    min_segment: int
    """Tokens that a segment has at least."""
    eos_ids: tuple[int, ...]
    """The ids that end a text."""

    def write(self, text: Text, begin: Array, forced: Array, going: Array) -> tuple[Text, Array]:
        """Writes one more token in the rows of `going` [B] whose segment, begun at begin [B], continues: the token
        forced [B], or the most probable one where that is −1. Gives (text, the token to feed [B]), −1 where nothing
        follows in the segment."""
        output, steps = text.output, text.tokens.shape[1]
        token = jnp.where(forced >= 0, forced, jnp.argmax(output.log_prob, axis=-1).astype(jnp.int32))
        eos, last = is_eos(token, self.eos_ids), text.length + 1 >= steps
        uncertain = (text.length - begin >= self.min_segment) & self.rule(output, self.threshold)
        writes = going & (~uncertain | eos | last)
        slot = jnp.where(writes, text.length, steps)

        def put(buffer: Array, new: Array) -> Array:
            return write(buffer, slot, new)

        text = text._replace(
            tokens=put(text.tokens, token),
            log_prob_ref=put(text.log_prob_ref, token_value(output.log_prob_ref, token)),
            log_norm=put(text.log_norm, output.log_norm + token_value(output.log_prob, token)),
            length=text.length + writes,
            finished=text.finished | (writes & eos),
            done=text.done | (writes & (eos | last)),
        )
        return text, jnp.where(writes & ~eos & ~last, token, -1)


def proceed(
    policy: Policy,
    params: Params,
    rng: Array,
    text: Text,
    begin: Array,
    token: Array,
    rules: Rules,
    *,
    unfinished: Array,
) -> tuple[Text, Array]:
    """The text with more of the most probable tokens, in the rows that have a token [B] to feed (−1: none), until at
    most `unfinished` [] rows have one left; (text, those tokens). begin [B]: where the rows' segments began. rng: used
    by policies that draw in their steps."""
    free = jnp.full_like(token, -1)

    def body(carry: Any) -> Any:
        j, text, token = carry
        state, output = step_policy(policy, params, jax.random.fold_in(rng, j), text.state, token)
        text = text._replace(state=state, output=where_rows(token >= 0, output, text.output))
        return j + 1, *rules.write(text, begin, free, token >= 0)

    carry = (jnp.zeros((), jnp.int32), text, token)
    _, text, token = jax.lax.while_loop(lambda carry: (carry[2] >= 0).sum() > unfinished, body, carry)
    return text, token


def fed(before: Text, after: Text) -> Array:
    """Steps [B] of the policy between two texts: every token but one that ended the text."""
    return after.length - before.length - (after.done & ~before.done)

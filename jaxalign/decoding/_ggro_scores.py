"""A reward and a gain as one judge of segments, which goes along with the text that is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.rewards import prefixes
from jaxalign.types import Array, Params, PrefixTokenGradient, Reward, State, TokenBatch

Gain = Callable[..., Array]
"""(params, tokens [N,L], mask [N,L], prompt_length [N], position [N], candidates [N,K]) -> [N,K]: the first-order score
g_v of each candidate token v at column `position`, so that g_v − g_current is its gain over the token that stands
there."""


class Judge(NamedTuple):
    """What GGRO asks of a segment, params {"reward", "gain"}.

    init(params, prompts, max_new_tokens) -> state
    score(params, state, tokens [B,S], mask [B,S], choices [B,k], more []) -> (reward [B], gain [B,k] of the choices in
        place of the first token, zeros where `more` is False, proposal)
    commit(params, state, proposal, choice [B]) -> state: 0 accepts the segment, −1 does not."""

    init: Callable[..., State]
    score: Callable[..., tuple[Array, Array, State]]
    commit: Callable[..., State]


def judge_of(reward: Reward | None, gain: Gain) -> Judge:
    """The judge of a reward and a gain; reward None: the one behind the gain, in one pass with it."""
    slope = prefixes.prefix_token_gradient(gain)
    if reward is None:
        return Judge(
            lambda params, *rest: slope.reward.init(params["gain"], *rest),
            lambda params, *rest: _both(slope, params["gain"], *rest),
            lambda params, *rest: slope.reward.commit(params["gain"], *rest),
        )
    value = prefixes.prefix_reward(reward)

    def init(params: Params, prompts: TokenBatch, max_new_tokens: int) -> State:
        return {
            "reward": value.init(params["reward"], prompts, max_new_tokens),
            "gain": slope.reward.init(params["gain"], prompts, max_new_tokens),
        }

    def score(
        params: Params, state: State, tokens: Array, mask: Array, choices: Array, more: Array
    ) -> tuple[Array, Array, State]:
        paid, own = value.score(params["reward"], state["reward"], tokens[:, None], mask[:, None])
        _, scores, beside = _both(slope, params["gain"], state["gain"], tokens, mask, choices, more)
        return at_least_float32(paid[:, 0]), scores, {"reward": own, "gain": beside}

    def commit(params: Params, state: State, proposal: State, choice: Array) -> State:
        return {
            "reward": value.commit(params["reward"], state["reward"], proposal["reward"], choice),
            "gain": slope.reward.commit(params["gain"], state["gain"], proposal["gain"], choice),
        }

    return Judge(init, score, commit)


def _both(
    slope: PrefixTokenGradient, params: Params, state: State, tokens: Array, mask: Array, choices: Array, more: Array
) -> tuple[Array, Array, State]:
    """(reward [B], gain [B,k], proposal); without the pass back where `more` is False."""

    def with_scores() -> tuple[Array, Array, State]:
        paid, scores, proposal = slope.score(params, state, tokens, mask, choices)
        return at_least_float32(paid), at_least_float32(scores), proposal

    kind = jax.eval_shape(with_scores)[1]

    def alone() -> tuple[Array, Array, State]:
        paid, proposal = slope.reward.score(params, state, tokens[:, None], mask[:, None])
        return at_least_float32(paid[:, 0]), jnp.zeros(kind.shape, kind.dtype), proposal

    return jax.lax.cond(more, with_scores, alone)

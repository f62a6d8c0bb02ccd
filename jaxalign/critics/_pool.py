"""A critic from several by a function of their scores: the worst, a lower bound, the least favourable weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign._blocks import accept_critic, merged, merged_candidates, split, verify_critic
from jaxalign._builders import cached
from jaxalign._checks import ParamsError, check_below, fields_of
from jaxalign._parts import (
    advance_critic,
    called,
    check_array,
    check_critic_argument,
    check_function_argument,
    score_critic,
    start_critic,
)
from jaxalign.critics._model_critics import gather
from jaxalign.pools import ScorePool
from jaxalign.prompts import prompt_index, prompts_at, prompts_for
from jaxalign.shapes import Candidates, PromptIndex, Scores
from jaxalign.types import Array, Critic, Params, Prompts, State, StepOutput


class PoolParams(NamedTuple):
    """Parameters of `pool`."""

    critics: Sequence[Params]
    """Those of each critic, in order."""
    pool: Params = None
    """Those of the function."""


class PoolState(NamedTuple):
    """State and proposal of `pool`."""

    critics: tuple[State, ...]
    """Those of each critic."""
    prompt_index: PromptIndex
    """[B], the prompt's row in its set."""


def pool(critics: Sequence[Critic], f: ScorePool) -> Critic:
    """A critic from several level critics: q = f(pool_params, q [B,m,K], log_prob [B,K], index [B]). Level.

    params: PoolParams(critics, pool), or a dict of these names. `jaxalign.pools` has functions for it: minimum,
    lower_bound, soft_minimum, worst_case.

    Args:
      critics: at least one, all levels: the least of increments is not what a token adds to the least of sums.
      f: gives scores [B,K]. log_prob is the candidates' under the policy below; tables per prompt are read by index.

    Returns:
      A level Critic.

    Raises:
      ValueError: no critics, something that is no Critic or no function, an increment critic (`level_of` makes a level
        of it), two vocabularies or betas; while tracing, a result of f that is not [B,K].
    """
    if isinstance(critics, Critic):
        raise ValueError("critics: expected a sequence of critics, found one Critic")
    return _pool(tuple(critics), f)


@cached
def _pool(critics: tuple[Critic, ...], f: ScorePool) -> Critic:
    if not critics:
        raise ValueError("critics: expected at least one critic, found none")
    for i, critic in enumerate(critics):
        check_critic_argument(f"critics[{i}]", critic)
        if critic.kind != "level":
            raise ValueError(
                f"critics[{i}]: expected a level critic, found {critic.kind!r} (critics.level_of makes one)"
            )
    check_function_argument("f", f)
    sizes = sorted({critic.vocab_size for critic in critics if critic.vocab_size is not None})
    if len(sizes) > 1:
        raise ValueError(f"critics: expected one vocabulary, found {sizes} tokens")
    betas = sorted({critic.beta for critic in critics if critic.beta is not None})
    if len(betas) > 1:
        raise ValueError(f"critics: expected critics for one beta, found {betas}")

    def fields(params: Params) -> PoolParams:
        found = fields_of(params, PoolParams)
        if not isinstance(found.critics, Sequence) or len(found.critics) != len(critics):
            number = len(found.critics) if isinstance(found.critics, Sequence) else type(found.critics).__name__
            raise ParamsError(f"expected parameters of {len(critics)} critics, found {number}", "['critics']")
        return found

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        given, prompts = fields(params), prompts_for(prompts, "critics")
        keys = jax.random.split(rng, len(critics))
        states = tuple(
            start_critic(critic, given.critics[i], keys[i], prompts_at(prompts, i), max_new_tokens)
            for i, critic in enumerate(critics)
        )
        return PoolState(states, prompt_index(prompts))

    def score(
        params: Params, rng: Array, state: PoolState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        given, keys = fields(params), jax.random.split(rng, len(critics))
        scored = [
            score_critic(critic, given.critics[i], keys[i], state.critics[i], output, candidates)
            for i, critic in enumerate(critics)
        ]
        each = jnp.stack([at_least_float32(q) for q, _ in scored], axis=1)
        pooled = f(given.pool, each, gather(output.log_prob, candidates), state.prompt_index)
        check_array(f"pool: f ({called(f)})", pooled, scored[0][0].shape, "one score per row and candidate")
        return pooled, state._replace(critics=tuple(proposal for _, proposal in scored))

    def advance(params: Params, proposal: PoolState, choice: Array) -> State:
        given = fields(params)
        return proposal._replace(
            critics=tuple(
                advance_critic(critic, given.critics[i], proposal.critics[i], choice)
                for i, critic in enumerate(critics)
            )
        )

    def verify(
        params: Params,
        rng: Array,
        state: PoolState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        given, keys = fields(params), jax.random.split(rng, len(critics))
        scored = [
            verify_critic(
                critic, given.critics[i], keys[i], state.critics[i], outputs, candidates, tokens, mask, choices
            )
            for i, critic in enumerate(critics)
        ]
        each = jnp.stack([merged(at_least_float32(q)) for q, _ in scored], axis=1)
        log_prob = gather(merged(outputs.log_prob), merged_candidates(candidates))
        pooled = f(given.pool, each, log_prob, jnp.repeat(state.prompt_index, tokens.shape[1]))
        check_array(f"pool: f ({called(f)})", pooled, log_prob.shape, "one score per row and candidate")
        return split(pooled, tokens.shape[0]), state._replace(critics=tuple(proposal for _, proposal in scored))

    def accept(params: Params, proposal: PoolState, count: Array) -> State:
        each = zip(critics, fields(params).critics, proposal.critics, strict=True)
        return proposal._replace(
            critics=tuple(accept_critic(critic, own, verified, count) for critic, own, verified in each)
        )

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        given, own = fields(params), prompts_for(prompts, "critics")
        for i, critic in enumerate(critics):
            check_below(critic, given.critics[i], prompts_at(own, i), max_new_tokens, f"['critics'][{i}]")

    vocab_size, beta = (sizes[0] if sizes else None), (betas[0] if betas else None)
    pool = Critic(init, score, advance, "level", check, vocab_size, beta)
    blocks = any(critic.verify is not None for critic in critics)
    return pool._replace(verify=verify, accept=accept) if blocks else pool

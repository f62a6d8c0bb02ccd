"""Critics from critics: weighted sums, and maps of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import add_scores, at_least_float32
from jaxalign._blocks import accept_critic, merged, merged_candidates, split, verify_critic
from jaxalign._builders import cached
from jaxalign._checks import ParamsError, check_below, check_part, fields_of, is_concrete
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
from jaxalign.prompts import prompt_index, prompts_at, prompts_for
from jaxalign.shapes import Candidates, LogProbs, PromptIndex, Scores
from jaxalign.types import Array, ArrayLike, Critic, Params, Prompts, State, StepOutput


class WeightedSumParams(NamedTuple):
    """Parameters of `weighted_sum`."""

    critics: Sequence[Params]
    """Those of each critic, in order."""
    weights: ArrayLike
    """[m], or one row per prompt [B,m]; any sign."""


class WeightedSumState(NamedTuple):
    """State and proposal of `weighted_sum`."""

    critics: tuple[State, ...]
    """Those of each critic."""
    weights: Array
    """[B,m]."""


def weighted_sum(critics: Sequence[Critic]) -> Critic:
    """The weighted sum of critics: q = Σ_i w_i·q_i.

    params: WeightedSumParams(critics, weights), or a dict of these names. Exact for V_ref, which is linear in the
    reward; the papers' rule for several rewards in GenARM and controlled decoding. A token outside the support of a
    critic (NEGATIVE, as `from_policy` gives) is outside that of the sum, whatever the sign of its weight, unless the
    weight is 0.

    Args:
      critics: at least one, all of one kind (levels and increments do not add) and one vocabulary.

    Returns:
      A Critic of the parts' kind.

    Raises:
      ValueError: no critics, something that is no Critic, two kinds, vocabularies or betas; on the host before tracing,
        weights of another shape or not finite, or parameters of another number of critics.
    """
    if isinstance(critics, Critic):
        raise ValueError("critics: expected a sequence of critics, found one Critic")
    return _weighted_sum(tuple(critics))  # a tuple has a hash, so that equal sums are one object


@cached
def _weighted_sum(critics: tuple[Critic, ...]) -> Critic:
    if not critics:
        raise ValueError("critics: expected at least one critic, found none")
    for i, critic in enumerate(critics):
        check_critic_argument(f"critics[{i}]", critic)
    kinds = sorted({critic.kind for critic in critics})
    if len(kinds) > 1:
        raise ValueError(f"critics: expected critics of one kind, found {kinds}")
    sizes = sorted({critic.vocab_size for critic in critics if critic.vocab_size is not None})
    if len(sizes) > 1:
        raise ValueError(f"critics: expected one vocabulary, found {sizes} tokens")
    betas = sorted({critic.beta for critic in critics if critic.beta is not None})
    if len(betas) > 1:
        raise ValueError(f"critics: expected critics for one beta, found {betas}")

    def fields(params: Params) -> WeightedSumParams:
        found = fields_of(params, WeightedSumParams)
        if not isinstance(found.critics, Sequence):
            raise ParamsError(f"expected a sequence, found {type(found.critics).__name__}", "['critics']")
        if len(found.critics) != len(critics):
            raise ParamsError(
                f"expected parameters of {len(critics)} critics, found {len(found.critics)}", "['critics']"
            )
        return found

    def weights_of(params: WeightedSumParams, batch: int) -> Array:
        weights = at_least_float32(params.weights)
        if weights.shape not in ((len(critics),), (batch, len(critics))):
            raise ValueError(
                f"weights: expected shape ({len(critics)},) or ({batch}, {len(critics)}), one weight per critic, "
                f"found {weights.shape}"
            )
        return jnp.broadcast_to(weights, (batch, len(critics)))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        params, prompts = fields(params), prompts_for(prompts, "critics")
        batch = prompt_index(prompts).shape[0]
        keys = jax.random.split(rng, len(critics))
        states = tuple(
            start_critic(critic, params.critics[i], keys[i], prompts_at(prompts, i), max_new_tokens)
            for i, critic in enumerate(critics)
        )
        return WeightedSumState(states, weights_of(params, batch))

    def score(
        params: Params, rng: Array, state: WeightedSumState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        params, keys = fields(params), jax.random.split(rng, len(critics))
        scored = [
            score_critic(critic, params.critics[i], keys[i], state.critics[i], output, candidates)
            for i, critic in enumerate(critics)
        ]
        q = add_scores([at_least_float32(q) for q, _ in scored], state.weights)
        return q, state._replace(critics=tuple(proposal for _, proposal in scored))

    def advance(params: Params, proposal: WeightedSumState, choice: Array) -> State:
        params = fields(params)
        states = tuple(
            advance_critic(critic, params.critics[i], proposal.critics[i], choice) for i, critic in enumerate(critics)
        )
        return proposal._replace(critics=states)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        params, prompts = fields(params), prompts_for(prompts, "critics")
        weights = weights_of(params, prompt_index(prompts).shape[0])
        if is_concrete(weights) and not np.all(np.isfinite(np.asarray(weights))):
            raise ValueError(f"weights: expected finite numbers, found {np.asarray(weights)}")
        for i, critic in enumerate(critics):
            check_below(critic, params.critics[i], prompts_at(prompts, i), max_new_tokens, f"['critics'][{i}]")

    def verify(
        params: Params,
        rng: Array,
        state: WeightedSumState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        params, keys = fields(params), jax.random.split(rng, len(critics))
        scored = [
            verify_critic(
                critic, params.critics[i], keys[i], state.critics[i], outputs, candidates, tokens, mask, choices
            )
            for i, critic in enumerate(critics)
        ]
        weights = jnp.repeat(state.weights, tokens.shape[1], axis=0)
        q = add_scores([at_least_float32(merged(q)) for q, _ in scored], weights)
        return split(q, tokens.shape[0]), state._replace(critics=tuple(proposal for _, proposal in scored))

    def accept(params: Params, proposal: WeightedSumState, count: Array) -> State:
        params = fields(params)
        proposals = tuple(
            accept_critic(critic, params.critics[i], proposal.critics[i], count) for i, critic in enumerate(critics)
        )
        return proposal._replace(critics=proposals)

    vocab_size, beta = (sizes[0] if sizes else None), (betas[0] if betas else None)
    total = Critic(init, score, advance, critics[0].kind, check, vocab_size, beta)
    blocks = any(critic.verify is not None for critic in critics)
    return total._replace(verify=verify, accept=accept) if blocks else total


class ScoreMap(Protocol):
    """A map of the candidates' scores q [B,K] to scores of the same shape. map_params: of the map; log_prob [B,K]: of
    the candidates under the policy below; index [B]: the prompt's row in its set (`look_up` reads tables by it)."""

    def __call__(self, map_params: Params, q: Scores, log_prob: LogProbs, index: PromptIndex, /) -> Scores: ...


class MapScoresParams(NamedTuple):
    """Parameters of `map_scores`."""

    critic: Params
    """Those of the critic whose scores are mapped."""
    map: Params
    """Those of the map."""


class MapScoresState(NamedTuple):
    """State and proposal of `map_scores`."""

    critic: State
    """Those of the critic whose scores are mapped."""
    index: PromptIndex  # type: ignore[assignment]  # shadows tuple.index, which nobody calls on a state
    """[B], the prompt's row in its set."""


@cached
def map_scores(critic: Critic, f: ScoreMap) -> Critic:
    """A critic with mapped scores, q' = f(map_params, q [B,K], log_prob [B,K], index [B]), of the same kind.

    params: MapScoresParams(critic, map), or a dict of these names. Clipping and standardising are such maps.

    Args:
      critic: whose scores are mapped.
      f: gives scores [B,K]. A table per prompt is read as `critics.look_up(map_params["table"], index)`: plain indexing
        of a jax array takes the last row in silence where the table is too short. Values per prompt cannot come from
        params by position: decoders repeat rows.

    Returns:
      A Critic of the same kind.

    Raises:
      ValueError: arguments of another kind; while tracing, a result of f that is not [B,K].
    """
    check_critic_argument("critic", critic)
    check_function_argument("f", f)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        critic_params = fields_of(params, MapScoresParams).critic
        state = start_critic(critic, critic_params, rng, prompts_for(prompts, "critic"), max_new_tokens)
        return MapScoresState(state, prompt_index(prompts))

    def score(
        params: Params, rng: Array, state: MapScoresState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        params = fields_of(params, MapScoresParams)
        q, proposal = score_critic(critic, params.critic, rng, state.critic, output, candidates)
        mapped = f(params.map, at_least_float32(q), gather(output.log_prob, candidates), state.index)
        check_array(f"map_scores: f ({called(f)})", mapped, q.shape, "one score per row and candidate")
        return mapped, state._replace(critic=proposal)

    def advance(params: Params, proposal: MapScoresState, choice: Array) -> State:
        critic_params = fields_of(params, MapScoresParams).critic
        return proposal._replace(critic=advance_critic(critic, critic_params, proposal.critic, choice))

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        fields_of(params, MapScoresParams)
        check_part(critic, params, prompts, max_new_tokens, "critic")

    def verify(
        params: Params,
        rng: Array,
        state: MapScoresState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        params = fields_of(params, MapScoresParams)
        q, proposal = verify_critic(
            critic, params.critic, rng, state.critic, outputs, candidates, tokens, mask, choices
        )
        q = merged(at_least_float32(q))
        log_prob = gather(merged(outputs.log_prob), merged_candidates(candidates))
        mapped = f(params.map, q, log_prob, jnp.repeat(state.index, tokens.shape[1]))
        check_array(f"map_scores: f ({called(f)})", mapped, q.shape, "one score per row and candidate")
        return split(mapped, tokens.shape[0]), state._replace(critic=proposal)

    def accept(params: Params, proposal: MapScoresState, count: Array) -> State:
        critic_params = fields_of(params, MapScoresParams).critic
        return proposal._replace(critic=accept_critic(critic, critic_params, proposal.critic, count))

    mapped_critic = Critic(init, score, advance, critic.kind, check, critic.vocab_size)
    return mapped_critic if critic.verify is None else mapped_critic._replace(verify=verify, accept=accept)

"""The tilt of a Policy by a Critic."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported, largest, per_row, where_rows
from jaxalign._blocks import (
    accept_critic,
    accept_policy,
    at,
    joined,
    last_moved,
    merged,
    split,
    verify_critic,
    verify_policy,
)
from jaxalign._builders import cached
from jaxalign._checks import check_count, check_part, check_positive, fields_of, is_concrete
from jaxalign._parts import (
    advance_critic,
    check_critic_argument,
    check_policy_argument,
    check_proposal,
    check_same_vocabulary,
    score_critic,
    start_critic,
    start_policy,
    step_policy,
)
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.shapes import Candidates, PerPrompt, Scores
from jaxalign.types import Array, ArrayLike, Critic, Params, Policy, Prompts, State, StepOutput


class TiltParams(NamedTuple):
    """Parameters of `tilt`."""

    policy: Params
    """Those of the policy below."""
    critic: Params
    """Those of the critic."""
    beta: ArrayLike
    """The KL weight > 0: a scalar, or one per prompt [B]."""


class TiltState(NamedTuple):
    """State of `tilt`."""

    policy: State
    """That of the policy below."""
    critic: State
    """The critic's proposal for the next token."""
    beta: PerPrompt
    """[B]."""
    previous: PerPrompt
    """[B], q of the token chosen last for a level critic; 0 at the start and for an increment critic."""
    q: Scores
    """[B,K], q of the next candidates (K = V without top_k)."""
    candidates: Candidates | None
    """[B,K] under top_k, else None."""


@cached
def tilt(policy: Policy, critic: Critic, *, top_k: int | None = None) -> Policy:
    """The aligned policy pi'(z|s) ∝ pi(z|s)·exp(q(s,z)/beta) on the candidates.

    params: TiltParams(policy, critic, beta), or a dict of these names. With l = log pi + q/beta on the candidates:

        log_prob' = l − logsumexp(l), NEGATIVE outside      log_norm' = log_norm + logsumexp(l) − previous

    previous = q/beta of the token chosen last for a level critic (0 at the start), 0 for an increment critic; so the
    sum of log_norm over a response is its sequential Monte Carlo weight under any critic. With the exact soft value,
    log_norm is log Z at the first token and 0 after. Differences of q are taken before they are divided by beta, so
    that log_prob' keeps the digits of log pi whatever the size of q/beta.

    Args:
      policy: the policy below, often `language_model(lm)`; a tilt may be tilted again.
      critic: gives q.
      top_k: the candidates are the top_k of log_prob; None: the whole vocabulary.

    Returns:
      A Policy.

    Raises:
      ValueError: swapped arguments, two vocabularies, or a top_k outside [1, V]; on the host before tracing, a
        beta <= 0 or of another shape, or one that the critic's scores are not for.
    """
    check_policy_argument("policy", policy)
    check_critic_argument("critic", critic)
    check_same_vocabulary("tilt", policy, critic)
    if top_k is not None:
        check_count("top_k", top_k, least=1)
    if top_k is not None and policy.vocab_size is not None and top_k > policy.vocab_size:
        raise ValueError(f"top_k: expected at most the vocabulary's {policy.vocab_size} tokens, found {top_k}")

    def propose(
        params: TiltParams,
        rng: Array,
        state: TiltState,
        output: StepOutput,
        frozen: Array | None,
    ) -> tuple[TiltState, StepOutput]:
        """Scores the next candidates and completes the state; frozen rows [B] keep candidates and scores."""
        candidates = None
        if top_k is not None:
            if top_k > output.log_prob.shape[-1]:
                raise ValueError(f"top_k: expected at most {output.log_prob.shape[-1]} tokens, found {top_k}")
            candidates = largest(output.log_prob, top_k)[1].astype(jnp.int32)
            if frozen is not None:
                candidates = where_rows(frozen, state.candidates, candidates)
        q, proposal = score_critic(critic, params.critic, rng, state.critic, output, candidates)
        q = at_least_float32(q)
        if frozen is not None:
            q = where_rows(frozen, state.q, q)
        state = state._replace(critic=proposal, q=q, candidates=candidates)
        return state, reweigh(state, output)

    def reweigh(state: TiltState, output: StepOutput) -> StepOutput:
        """The tilted output of rows whose scores and candidates are in their state; the states below are not read."""
        q, candidates, log_prob = state.q, state.candidates, output.log_prob
        if candidates is not None:
            log_prob = jnp.take_along_axis(log_prob, candidates, axis=-1)
        # The largest score of a token that has mass: a constant of the policy, whose derivatives cancel.
        top = jnp.where(is_supported(log_prob), jax.lax.stop_gradient(q), -jnp.inf).max(axis=-1)
        top = jnp.where(jnp.isfinite(top), top, 0)
        # Tokens outside the critic's support are outside the tilt's; where that leaves none, the policy stays as it is.
        inside = is_supported(q)
        empty = ~(inside & is_supported(log_prob)).any(axis=-1, keepdims=True)
        shift = jnp.where(inside & ~empty, q - top[:, None], 0)
        logit = jnp.where(inside | empty, log_prob + shift / state.beta[:, None], NEGATIVE)
        norm = jax.nn.logsumexp(logit, axis=-1)
        tilted = jnp.where(inside | empty, logit - norm[:, None], NEGATIVE)
        if candidates is not None:
            outside = jnp.full(output.log_prob.shape, NEGATIVE, tilted.dtype)
            tilted = jax.vmap(lambda row, index, value: row.at[index].set(value))(outside, candidates, tilted)
        log_norm = output.log_norm + norm + (top - state.previous) / state.beta
        return output._replace(log_prob=tilted, log_norm=log_norm)

    def choice_of(candidates: Array | None, token: Array) -> Array:
        """The place of tokens [...] among candidates [...,K]; -1 for none, and for no token."""
        if candidates is None:
            return token
        hit = (candidates == token[..., None]) & (token >= 0)[..., None]
        return jnp.where(hit, jnp.arange(hit.shape[-1]), -1).max(axis=-1)

    def chosen_score(q: Array, choice: Array) -> tuple[Array, Array]:
        """q [...,K] of the token chosen [...], and whether it becomes the last score of a level critic: the weight of a
        text outside the critic's support stays log 0, which the next score would be set against."""
        chosen = jnp.take_along_axis(q, jnp.maximum(choice, 0)[..., None], axis=-1)[..., 0]
        return chosen, (choice >= 0) & is_supported(chosen) & (critic.kind == "level")

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        params = fields_of(params, TiltParams)
        below, beside, scoring = jax.random.split(rng, 3)
        inner, output = start_policy(policy, params.policy, below, prompts_for(prompts, "policy"), max_new_tokens)
        scorer = start_critic(critic, params.critic, beside, prompts_for(prompts, "critic"), max_new_tokens)
        beta = per_row(params.beta, output.log_prob.shape[0], name="beta")
        unscored = jnp.zeros((beta.shape[0], 0), beta.dtype)  # `propose` puts the scores of the first step here
        state = TiltState(inner, scorer, beta, jnp.zeros_like(output.log_norm), unscored, None)
        return propose(params, scoring, state, output, None)

    def step(params: Params, rng: Array, state: TiltState, token: Array) -> tuple[State, StepOutput]:
        params = fields_of(params, TiltParams)
        below, scoring = jax.random.split(rng)
        choice = choice_of(state.candidates, token)
        frozen = choice < 0  # no token, or one of probability zero
        chosen, moves = chosen_score(state.q, choice)
        previous = jnp.where(moves, chosen, state.previous).astype(state.previous.dtype)
        scorer = advance_critic(critic, params.critic, state.critic, choice)
        inner, output = step_policy(policy, params.policy, below, state.policy, jnp.where(frozen, -1, token))
        moved = state._replace(policy=inner, critic=scorer, previous=previous)
        moved, output = propose(params, scoring, moved, output, frozen)
        check_proposal(critic, state.critic, moved.critic)
        return moved, output

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        beta = fields_of(params, TiltParams).beta
        check_positive("beta", beta)
        per_row(beta, prompt_index(prompts).shape[0], name="beta")
        if critic.beta is not None and is_concrete(beta) and np.any(np.asarray(beta) != critic.beta):
            raise ValueError(
                f"beta: expected {critic.beta:g}, the only one that this critic's scores are for, found "
                f"{np.asarray(beta)}"
            )
        check_part(policy, params, prompts, max_new_tokens, "policy")
        check_part(critic, params, prompts, max_new_tokens, "critic")

    def verify(
        params: Params,
        rng: Array,
        state: TiltState,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        params = fields_of(params, TiltParams)
        under, scoring = jax.random.split(rng)
        if below is None:
            below = verify_policy(policy, params.policy, under, state.policy, tokens, mask)
        outputs, inner = below
        candidates, offered = None, state.candidates
        if top_k is not None:
            candidates = largest(outputs.log_prob, top_k)[1].astype(jnp.int32)
            offered = joined(state.candidates, candidates)
        before = None if offered is None else offered[:, :-1]
        choices = choice_of(before, jnp.where(mask, tokens, -1))
        q, proposal = verify_critic(
            critic, params.critic, scoring, state.critic, outputs, candidates, tokens, mask, choices
        )
        q = joined(state.q, at_least_float32(q))
        chosen, moves = chosen_score(q[:, :-1], choices)
        previous = last_moved(state.previous, chosen.astype(state.previous.dtype), moves)
        rows = TiltState(
            None, None, jnp.repeat(state.beta, tokens.shape[1]), *merged((previous[:, 1:], q[:, 1:], candidates))
        )
        tilted = split(reweigh(rows, merged(outputs)), tokens.shape[0])
        return tilted, TiltState(inner, proposal, state.beta, previous, q, offered)

    def accept(params: Params, proposal: TiltState, count: Array) -> State:
        params = fields_of(params, TiltParams)
        inner = accept_policy(policy, params.policy, proposal.policy, count)
        scorer = accept_critic(critic, params.critic, proposal.critic, count)
        kept = at((proposal.previous, proposal.q, proposal.candidates), count)
        return TiltState(inner, scorer, proposal.beta, *kept)

    vocab_size = policy.vocab_size or critic.vocab_size
    return Policy(init, step, None, check, vocab_size, policy.eos_ids, verify, accept, below=policy)

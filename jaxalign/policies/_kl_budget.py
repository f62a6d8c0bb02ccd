"""A tilt whose beta is found at each step, so that the step spends a given KL."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import gibbs
from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported, largest, per_row, where_rows
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


class KLBudgetParams(NamedTuple):
    """Parameters of `kl_budget`."""

    policy: Params
    """Those of the policy below."""
    critic: Params
    """Those of the critic."""
    kl: ArrayLike
    """The KL of each step to the policy below [nats], > 0: a scalar, or one per prompt [B]."""


class KLBudgetState(NamedTuple):
    """State of `kl_budget`."""

    policy: State
    """That of the policy below."""
    critic: State
    """The critic's proposal for the next token."""
    kl: PerPrompt
    """[B], in nats."""
    beta: PerPrompt
    """[B], that of the next token."""
    previous: PerPrompt
    """[B], q of the token chosen last for a level critic; 0 at the start and for an increment critic."""
    q: Scores
    """[B,K], q of the next candidates (K = V without top_k)."""
    candidates: Candidates | None
    """[B,K] under top_k, else None."""


@cached
def kl_budget(policy: Policy, critic: Critic, *, top_k: int | None = None) -> Policy:
    """The tilt pi'(z|s) ∝ pi(z|s)·exp(q(s,z)/beta_s) whose beta_s is that at which KL(pi'(·|s)‖pi(·|s)) is the budget.

    params: KLBudgetParams(policy, critic, kl), or a dict of these names. beta_s is `gibbs.match_kl` of the candidates,
    with its derivatives. A budget that is more than −log pi(best) gives the best candidate; scores that are all equal
    leave the policy as it is. The KL of a response is the budget times its mean length, where each step attains it. A
    tilt by one beta spends more where the critic has more to say, and has the better reward for its KL; this one bounds
    every step. log_norm' = log_norm + log Σ pi·exp((q − q_last)/beta_s), q_last of the last token for a level critic.

    Σ log_norm is log pi_ref(y) − log pi'(y) + Σ_s (q_s − q_last)/beta_s, each step at its own beta: no weight of
    exp(q/beta) of the whole text at any one beta, as a tilt's is. `decoding.smc` corrects for it at the end, so that
    its Z is unbiased as with every proposal; but the exact soft value does not make the weights equal here, and
    resampling between steps prefers texts by the budgets that they spent.

    Args:
      policy: the policy below.
      critic: gives q, of any unit.
      top_k: the candidates are the top_k of log_prob, and the budget is to the policy on them; None: all tokens.

    Returns:
      A Policy.

    Raises:
      ValueError: swapped arguments, two vocabularies, a top_k below 1; on the host before tracing, a kl <= 0, not
        finite or of another shape, or a critic whose scores are for one beta.
    """
    check_policy_argument("policy", policy)
    check_critic_argument("critic", critic)
    check_same_vocabulary("kl_budget", policy, critic)
    if critic.beta is not None:
        raise ValueError(f"critic: expected scores for any beta, found some for {critic.beta:g} alone")
    if top_k is not None:
        check_count("top_k", top_k, least=1)
    if top_k is not None and policy.vocab_size is not None and top_k > policy.vocab_size:
        raise ValueError(f"top_k: expected at most the vocabulary's {policy.vocab_size} tokens, found {top_k}")

    def propose(
        params: KLBudgetParams, rng: Array, state: KLBudgetState, output: StepOutput, frozen: Array | None
    ) -> tuple[KLBudgetState, StepOutput]:
        """Scores the next candidates and finds beta; frozen rows [B] keep candidates and scores."""
        candidates, log_prob = None, output.log_prob
        if top_k is not None:
            candidates = largest(output.log_prob, top_k)[1].astype(jnp.int32)
            if frozen is not None:
                candidates = where_rows(frozen, state.candidates, candidates)
            log_prob = jnp.take_along_axis(log_prob, candidates, axis=-1)
        q, proposal = score_critic(critic, params.critic, rng, state.critic, output, candidates)
        q = at_least_float32(q)
        if frozen is not None:
            q = where_rows(frozen, state.q, q)
        inside = is_supported(q) & is_supported(log_prob)
        empty = ~inside.any(axis=-1, keepdims=True)
        log_base = jnp.where(inside | empty, log_prob, NEGATIVE)
        score = jnp.where(inside, q - state.previous[:, None], 0)
        beta = gibbs.match_kl(log_base, score, kl=state.kl).astype(state.beta.dtype)
        tilted = gibbs.log_policy(log_base, score, beta=beta)
        log_norm = output.log_norm + gibbs.log_partition(log_base, score, beta=beta)
        if candidates is not None:
            outside = jnp.full(output.log_prob.shape, NEGATIVE, tilted.dtype)
            tilted = jax.vmap(lambda row, index, value: row.at[index].set(value))(outside, candidates, tilted)
        state = state._replace(critic=proposal, q=q, candidates=candidates, beta=beta)
        return state, output._replace(log_prob=tilted, log_norm=log_norm)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        given = fields_of(params, KLBudgetParams)
        below, beside, scoring = jax.random.split(rng, 3)
        inner, output = start_policy(policy, given.policy, below, prompts_for(prompts, "policy"), max_new_tokens)
        scorer = start_critic(critic, given.critic, beside, prompts_for(prompts, "critic"), max_new_tokens)
        kl = per_row(given.kl, output.log_prob.shape[0], name="kl")
        zero = jnp.zeros(kl.shape, jnp.result_type(kl, output.log_norm))
        state = KLBudgetState(inner, scorer, kl, zero, zero, zero[:, None][:, :0], None)
        return propose(given, scoring, state, output, None)

    def step(params: Params, rng: Array, state: KLBudgetState, token: Array) -> tuple[State, StepOutput]:
        given = fields_of(params, KLBudgetParams)
        below, scoring = jax.random.split(rng)
        choice = token
        if state.candidates is not None:
            hit = (state.candidates == token[:, None]) & (token >= 0)[:, None]
            choice = jnp.where(hit, jnp.arange(hit.shape[1]), -1).max(axis=-1)
        frozen = choice < 0  # no token, or one of probability zero
        previous = state.previous
        if critic.kind == "level":
            chosen = jnp.take_along_axis(state.q, jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
            previous = jnp.where(frozen | ~is_supported(chosen), previous, chosen).astype(previous.dtype)
        scorer = advance_critic(critic, given.critic, state.critic, choice)
        inner, output = step_policy(policy, given.policy, below, state.policy, jnp.where(frozen, -1, token))
        moved = state._replace(policy=inner, critic=scorer, previous=previous)
        moved, output = propose(given, scoring, moved, output, frozen)
        check_proposal(critic, state.critic, moved.critic)
        return moved, output

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        kl = fields_of(params, KLBudgetParams).kl
        check_positive("kl", kl)
        if is_concrete(kl) and not np.all(np.isfinite(np.asarray(kl))):
            raise ValueError(f"kl: expected finite numbers, found {np.asarray(kl)}")
        per_row(kl, prompt_index(prompts).shape[0], name="kl")
        check_part(policy, params, prompts, max_new_tokens, "policy")
        check_part(critic, params, prompts, max_new_tokens, "critic")

    return Policy(init, step, None, check, policy.vocab_size or critic.vocab_size, policy.eos_ids)

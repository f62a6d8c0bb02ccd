"""The tilt of a Policy by a Critic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import NEGATIVE, at_least_float32, per_row, where_rows
from jaxalign._checks import check_part, check_positive, check_same_vocabulary, entry, is_concrete
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.types import Array, Critic, Params, Policy, Prompts, State, StepOutput


def tilt(policy: Policy, critic: Critic, *, top_k: int | None = None) -> Policy:
    """The aligned policy pi'(z|s) ∝ pi(z|s)·exp(q(s,z)/beta) on the candidates.

    params {"policy", "critic", "beta": scalar or [B], > 0}. Candidates are the top_k of log_prob, or the whole
    vocabulary. With l = log pi + q/beta on the candidates:

        log_prob' = l − logsumexp(l), NEGATIVE outside      log_norm' = log_norm + logsumexp(l) − previous

    previous = q/beta of the token chosen last for a level critic (0 at the start), 0 for an increment critic; so the
    sum of log_norm over a response is its sequential Monte Carlo weight under any critic. With the exact soft value,
    log_norm is log Z at the first token and 0 after.
    """
    check_same_vocabulary("tilt", policy, critic)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1 candidate or None, found {top_k}")
    if top_k is not None and policy.vocab_size is not None and top_k > policy.vocab_size:
        raise ValueError(f"top_k: expected at most the vocabulary's {policy.vocab_size} tokens, found {top_k}")

    def propose(params: Params, rng: Array, state: dict[str, Any], output: StepOutput, still: Array | None) -> Any:
        """Scores the next candidates and completes the state; rows that stand still keep candidates and scores."""
        candidates = None
        if top_k is not None:
            if top_k > output.log_prob.shape[-1]:
                raise ValueError(f"top_k: expected at most {output.log_prob.shape[-1]} tokens, found {top_k}")
            candidates = jax.lax.top_k(output.log_prob, top_k)[1].astype(jnp.int32)
            if still is not None:
                candidates = where_rows(still, state["candidates"], candidates)
        q, proposal = critic.score(params["critic"], rng, state["critic"], output, candidates)
        q = at_least_float32(q) / state["beta"][:, None]
        if still is not None:
            q = where_rows(still, state["q"], q)
        log_prob = output.log_prob
        if candidates is not None:
            log_prob = jnp.take_along_axis(log_prob, candidates, axis=-1)
        logit = log_prob + q
        norm = jax.nn.logsumexp(logit, axis=-1)
        tilted = logit - norm[:, None]
        if candidates is not None:
            outside = jnp.full(output.log_prob.shape, NEGATIVE, tilted.dtype)
            tilted = jax.vmap(lambda row, index, value: row.at[index].set(value))(outside, candidates, tilted)
        new = {"policy": state["policy"], "critic": proposal, "beta": state["beta"], "q": q}
        new["previous"] = state["previous"]
        if candidates is not None:
            new["candidates"] = candidates
        log_norm = output.log_norm + norm - state["previous"]
        return new, output._replace(log_prob=tilted, log_norm=log_norm)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        below, beside, scoring = jax.random.split(rng, 3)
        inner, output = policy.init(params["policy"], below, prompts_for(prompts, "policy"), max_new_tokens)
        judge = critic.init(params["critic"], beside, prompts_for(prompts, "critic"), max_new_tokens)
        beta = per_row(params["beta"], output.log_prob.shape[0], name="beta")
        state = {"policy": inner, "critic": judge, "beta": beta, "previous": jnp.zeros_like(output.log_norm)}
        return propose(params, scoring, state, output, None)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        below, scoring = jax.random.split(rng)
        choice = token
        if top_k is not None:
            hit = (state["candidates"] == token[:, None]) & (token >= 0)[:, None]
            choice = jnp.where(hit, jnp.arange(top_k), -1).max(axis=-1)
        still = choice < 0  # no token, or one of probability zero
        previous = state["previous"]
        if critic.kind == "level":
            chosen = jnp.take_along_axis(state["q"], jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
            previous = jnp.where(still, previous, chosen)
        judge = critic.advance(params["critic"], state["critic"], choice)
        inner, output = policy.step(params["policy"], below, state["policy"], jnp.where(still, -1, token))
        state = {**state, "policy": inner, "critic": judge, "previous": previous}
        return propose(params, scoring, state, output, still)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        check_positive("beta", entry(params, "beta"))
        per_row(params["beta"], prompt_index(prompts).shape[0], name="beta")
        found = params["beta"]
        if critic.beta is not None and is_concrete(found) and np.any(np.asarray(found) != critic.beta):
            raise ValueError(
                f"beta: expected {critic.beta:g}, the only one that this critic's scores are for, found "
                f"{np.asarray(found)}"
            )
        check_part(policy, params, prompts, max_new_tokens, "policy")
        check_part(critic, params, prompts, max_new_tokens, "critic")

    return Policy(init, step, None, check, policy.vocab_size or critic.vocab_size)

"""The language model as a Policy, alone or with another one as its base."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import models
from jaxalign._checks import check_has_logits, check_part, check_prompt_fits, check_same_vocabulary
from jaxalign.prompts import prompts_for
from jaxalign.types import Array, Completions, Params, Policy, Prompts, State, StepOutput, TokenBatch


def language_model(lm: Any) -> Policy:
    """pi(z|s) = softmax(logits(s))_z of a language model; it is its own base. params: the model's.

    `lm` is what `models.load` gives, or anything with its `prefill`, `step`, `hidden`, `logits` and `max_length`.
    The prompt is encoded once; the state is the model's cache with room for max_new_tokens. ValueError for a sequence
    classifier, which has no vocabulary logits.
    """
    check_has_logits("language_model", lm)

    def output(params: Params, hidden: Array) -> StepOutput:
        log_prob = jax.nn.log_softmax(lm.logits(params, hidden))
        return StepOutput(log_prob, log_prob, jnp.zeros(hidden.shape[:1], log_prob.dtype), hidden)

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> tuple[State, StepOutput]:
        del rng
        capacity = prompts.tokens.shape[1] + max_new_tokens
        hidden, cache = lm.prefill(params, prompts.tokens, prompts.mask, capacity)
        return cache, output(params, hidden)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        del rng
        hidden, cache = lm.step(params, state, token)
        return cache, output(params, hidden)

    def log_prob(params: Params, prompts: TokenBatch, tokens: Array, mask: Array) -> Completions:
        hidden = models.response_hidden(lm, params, prompts, tokens, mask)
        value = jnp.where(mask, models.token_log_prob(lm, params, hidden, tokens), 0)
        zero = jnp.zeros_like(value)
        rows = jnp.zeros(tokens.shape[:1], bool)
        return Completions(tokens, mask, value, value, zero, zero, rows, ~rows, ~rows)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_prompt_fits(lm, prompts, max_new_tokens)

    return Policy(init, step, log_prob, check, lm.vocab_size)


def with_reference(policy: Policy, reference: Policy) -> Policy:
    """`policy` with log_prob_ref of another model beside it: a DPO or RL model is not its own base.

    params {"policy", "reference"}. The KL of a decoder is then against the reference. log_norm is the policy's own.
    """
    check_same_vocabulary("with_reference", policy, reference)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        one, other = jax.random.split(rng)
        inner, output = policy.init(params["policy"], one, prompts_for(prompts, "policy"), max_new_tokens)
        beside, base = reference.init(params["reference"], other, prompts_for(prompts, "reference"), max_new_tokens)
        return {"policy": inner, "reference": beside}, output._replace(log_prob_ref=base.log_prob)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        one, other = jax.random.split(rng)
        inner, output = policy.step(params["policy"], one, state["policy"], token)
        beside, base = reference.step(params["reference"], other, state["reference"], token)
        return {"policy": inner, "reference": beside}, output._replace(log_prob_ref=base.log_prob)

    def log_prob(params: Params, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
        assert policy.log_prob is not None
        assert reference.log_prob is not None
        own = policy.log_prob(params["policy"], prompts_for(prompts, "policy"), tokens, mask)
        base = reference.log_prob(params["reference"], prompts_for(prompts, "reference"), tokens, mask)
        # The exact KL needs both distributions at every position; the parallel form keeps neither.
        return own._replace(log_prob_ref=base.log_prob, kl=None)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        check_part(policy, params, prompts, max_new_tokens, "policy")
        check_part(reference, params, prompts, max_new_tokens, "reference")

    parallel = policy.log_prob is not None and reference.log_prob is not None
    return Policy(init, step, log_prob if parallel else None, check, policy.vocab_size)

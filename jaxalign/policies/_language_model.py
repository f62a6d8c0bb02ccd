"""A language model as a Policy."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from jaxalign import models
from jaxalign._builders import cached
from jaxalign._checks import check_has_logits, check_model_params, check_prompt_fits
from jaxalign._parts import check_array, check_model
from jaxalign.models.blocks import Block, BlockModel, append_block, read_block, reads_blocks
from jaxalign.types import Array, Completions, LanguageModel, Params, Policy, State, StepOutput, TokenBatch


@cached
def language_model(lm: LanguageModel) -> Policy:
    """The Policy pi(z|s) = softmax(logits(s))_z of a language model, which is its own base.

    params: the model's. The prompt is encoded once; the state is the model's cache with room for max_new_tokens.

    Args:
      lm: what `models.load` gives, or a model of your own with what `types.LanguageModel` lists: vocab_size,
        max_length, eos_ids, prefill, step and logits. One that also has `hidden` (as in `types.HeadModel`) scores given
        responses in parallel; any other is stepped through them. One that also has `segments` and `append` verifies
        several tokens in one pass (`Policy.verify`), unless its rotary frequencies depend on a text's length.

    Returns:
      A Policy with the model's vocab_size and eos_ids.

    Raises:
      ValueError: the model lacks one of these (it is named), or is a sequence classifier without vocabulary logits.
    """
    check_model("language_model", lm, ("vocab_size", "max_length", "eos_ids", "prefill", "step", "logits"))
    check_has_logits("language_model", lm)

    def output(params: Params, hidden: Array) -> StepOutput:
        logits = lm.logits(params, hidden)
        check_array("language_model: lm.logits", logits, (*hidden.shape[:-1], lm.vocab_size), "one logit per token")
        log_prob = jax.nn.log_softmax(logits)
        return StepOutput(log_prob, log_prob, jnp.zeros(hidden.shape[:-1], log_prob.dtype), hidden)

    def next_output(params: Params, hidden: Array) -> StepOutput:
        if hidden.ndim != 2:
            raise ValueError(f"language_model: expected hidden states [B,D] of the model, found shape {hidden.shape}")
        return output(params, hidden)

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> tuple[State, StepOutput]:
        del rng
        capacity = prompts.tokens.shape[1] + max_new_tokens
        hidden, cache = lm.prefill(params, prompts.tokens, prompts.mask, capacity)
        return cache, next_output(params, hidden)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        del rng
        hidden, cache = lm.step(params, state, token)
        return cache, next_output(params, hidden)

    def log_prob(params: Params, prompts: TokenBatch, tokens: Array, mask: Array) -> Completions:
        parallel = cast(models.LanguageModel, lm)  # all that is asked of it here is `hidden` and `logits`
        hidden = models.response_hidden(parallel, params, prompts, tokens, mask)
        value = jnp.where(mask, models.token_log_prob(parallel, params, hidden, tokens), 0)
        zero = jnp.zeros_like(value)
        rows = jnp.zeros(tokens.shape[:1], bool)
        return Completions(tokens, mask, value, value, zero, zero, rows, ~rows, ~rows)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_model_params(lm, params, head=False)
        check_prompt_fits(lm, prompts, max_new_tokens)

    def verify(
        params: Params,
        rng: Array,
        state: State,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        del rng, below
        hidden, block = read_block(cast(BlockModel, lm), params, state, tokens, mask)
        return output(params, hidden), block

    def accept(params: Params, proposal: Block, count: Array) -> State:
        return append_block(cast(BlockModel, lm), proposal, count)

    in_parallel = log_prob if hasattr(lm, "hidden") else None
    policy = Policy(init, step, in_parallel, check, lm.vocab_size, tuple(int(i) for i in lm.eos_ids))
    return policy._replace(verify=verify, accept=accept) if reads_blocks(lm) else policy

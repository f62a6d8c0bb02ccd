"""A base and m adapters of it as one Policy: 1+m rows per prompt through one read of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import gibbs, mdp, models
from jaxalign._arrays import at_least_float32, repeat_rows
from jaxalign._builders import cached
from jaxalign._checks import check_count, check_has_logits, check_prompt_fits, fields_of, is_concrete
from jaxalign._parts import check_model
from jaxalign.prompts import prompt_index, prompts_at, prompts_for
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts, State, StepOutput, TokenBatch


class AdaptersParams(NamedTuple):
    """Parameters of `adapters`."""

    policy: Params
    """Those of the base model, without an adapter."""
    adapters: Params
    """`models.lora.stack` of m adapters."""
    weights: ArrayLike
    """[m], or one row per prompt [B,m]: the weight of each adapter's reward."""


class AdaptersState(NamedTuple):
    """State of `adapters`."""

    cache: State
    """The model's cache of the base's row and the m adapted rows of each prompt, leaves [B,1+m,...]."""
    weights: Array
    """[B,m]."""


@cached
def adapters(lm: models.LanguageModel, m: int) -> Policy:
    """GenARM with m autoregressive rewards that are adapters of the base (arXiv 2410.08193, eq. 7):

        pi(z|s) ∝ pi_ref(z|s)·Π_i pi_{r,i}(z|s)^{w_i}        log_norm = log Σ_z of the right side

    params: AdaptersParams(policy, adapters, weights), or a dict of these names. The distribution is that of
    `tilt(language_model(lm), weighted_sum([genarm(lm)] * m))` with beta 1 and merged weights, at the cost of a step of
    1+m rows and not of 1+m models: the base and the adapted rows share each read of the weights. hidden is the base's.
    Each adapter may have prompts of its own: {"policy": …, "adapters": one batch, or m of them}.

    Args:
      lm: the base's model.
      m: the number of adapters, >= 1.

    Returns:
      A Policy.

    Raises:
      ValueError: m < 1 or a model without logits; on the host before tracing, an adapter that does not fit (the tensor
        is named), or weights of another shape or not finite.
    """
    check_model("adapters", lm, ("vocab_size", "max_length", "eos_ids", "prefill", "step", "logits", "hidden"))
    check_has_logits("adapters", lm)
    check_count("m", m, least=1, unit="adapter")

    def weights_of(params: AdaptersParams, batch: int) -> Array:
        weights = at_least_float32(params.weights)
        if weights.shape not in ((m,), (batch, m)):
            raise ValueError(
                f"weights: expected shape ({m},) or ({batch}, {m}), one weight per adapter, found {weights.shape}"
            )
        return jnp.broadcast_to(weights, (batch, m))

    def each_prompts(prompts: Prompts) -> list[TokenBatch]:
        """Prompts of the base and of the m adapters."""
        return [prompts_for(prompts, "policy")] + [prompts_at(prompts_for(prompts, "adapters"), i) for i in range(m)]

    def rows_of(prompts: Prompts) -> TokenBatch:
        """[B(1+m),P]: a prompt's rows are neighbours, the base's first."""
        each = each_prompts(prompts)
        width = max(one.tokens.shape[1] for one in each)

        def join(arrays: list[Array]) -> Array:
            padded = [jnp.pad(jnp.asarray(x), ((0, 0), (width - x.shape[1], 0))) for x in arrays]
            return jnp.stack(padded, axis=1).reshape(-1, width)

        return TokenBatch(join([one.tokens for one in each]), join([one.mask for one in each]))

    def joined(params: AdaptersParams) -> Params:
        """The base's weights with the stacked adapters beside them."""
        if "lora" in params.policy:
            raise ValueError(
                "policy: expected a base without an adapter (models.lora.merge it), found one under 'lora'"
            )
        kernels = models.lora.kernel_shapes(params.policy)
        models.lora.check_fits(kernels, params.adapters, m=m)
        return {**params.policy, "lora": params.adapters}

    def combine(params: AdaptersParams, hidden: Array, weights: Array) -> StepOutput:
        """hidden [...,1+m,D], weights [...,m] -> outputs [...,V]."""
        each = jax.nn.log_softmax(lm.logits(params.policy, hidden))
        logit = each[..., 0, :] + (weights[..., None] * each[..., 1:, :]).sum(axis=-2)
        norm = jax.nn.logsumexp(logit, axis=-1)
        return StepOutput(logit - norm[..., None], each[..., 0, :], norm, hidden[..., 0, :])

    def grouped(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, 1 + m, *x.shape[1:]), tree)

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        del rng
        params, rows = fields_of(params, AdaptersParams), rows_of(prompts)
        weights = weights_of(params, rows.tokens.shape[0] // (1 + m))
        hidden, cache = lm.prefill(joined(params), rows.tokens, rows.mask, rows.tokens.shape[1] + max_new_tokens)
        return AdaptersState(grouped(cache), weights), combine(params, grouped(hidden), weights)

    def step(params: Params, rng: Array, state: AdaptersState, token: Array) -> tuple[State, StepOutput]:
        del rng
        params = fields_of(params, AdaptersParams)
        hidden, cache = lm.step(joined(params), flat(state.cache), jnp.repeat(token, 1 + m))
        return state._replace(cache=grouped(cache)), combine(params, grouped(hidden), state.weights)

    def log_prob(params: Params, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
        params = fields_of(params, AdaptersParams)
        weights = weights_of(params, tokens.shape[0])
        text, text_mask, length = mdp.concatenate(rows_of(prompts), *repeat_rows((tokens, mask), 1 + m))
        # Token t of a response is predicted at position length + t - 1 of the compacted row.
        position = jnp.minimum(length[:, None] - 1 + jnp.arange(tokens.shape[1]), text.shape[1] - 1)
        hidden = lm.hidden(joined(params), text, mask=text_mask, at=position)

        def part(hidden: Array, tokens: Array) -> tuple[Array, Array, Array, Array]:
            output = combine(params, hidden, weights[:, None])
            own, ref = (jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0] for x in output[:2])
            return own, ref, output.log_norm, gibbs.kl(output.log_prob, output.log_prob_ref)

        found = models.chunked(part, jnp.moveaxis(grouped(hidden), 1, 2), tokens)
        own, ref, norm, kl = (jnp.where(mask, x, 0) for x in found)
        rows = jnp.zeros(tokens.shape[:1], bool)
        return Completions(tokens, mask, own, ref, norm, kl, rows, ~rows, ~rows)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        params = fields_of(params, AdaptersParams)
        weights = weights_of(params, prompt_index(prompts).shape[0])
        if is_concrete(weights) and not np.all(np.isfinite(np.asarray(weights))):
            raise ValueError(f"weights: expected finite numbers, found {np.asarray(weights)}")
        joined(params)
        names = ["prompts['policy']"] + [f"prompts['adapters'][{i}]" for i in range(m)]
        for name, one in zip(names, each_prompts(prompts), strict=True):
            check_prompt_fits(lm, one, max_new_tokens, name="prompts" if isinstance(prompts, TokenBatch) else name)

    return Policy(init, step, log_prob, check, lm.vocab_size, lm.eos_ids)

"""Representation editing: the last hidden state climbs a value before it is unembedded (RE-Control)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import models
from jaxalign._arrays import at_least_float32, is_supported, per_row, where_rows
from jaxalign._checks import check_part, check_same_vocabulary, entry, is_concrete
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.types import Array, Critic, Params, Policy, Prompts, State, StepOutput

Unembed = Callable[[Params, Array], Array]
Value = Callable[[Params, Array], Array]


def re_control(policy: Policy, unembed: Unembed, value: Value, *, steps: int, max_norm: float | None = None) -> Policy:
    """RE-Control: h' = h + d, where d is `steps` steps of gradient ascent on V (arXiv 2406.05954, section 4.3):

        d_0 = 0     d_{j+1} = d_j + step_size·∇V(h + d_j)
        log pi'(z|s) = log pi(z|s) + q_z − log Σ_z pi(z|s)·exp(q_z)     q = unembed(h + d) − unembed(h)

    params {"policy", "value", "step_size": scalar or [B] >= 0}. h is the policy's hidden state [B,D] after the final
    norm, V(h) the value BEFORE the next token is drawn. The cache is untouched: only the token that is drawn carries
    the edit on. Rows are independent; d and V are in at least float32. No steps, or a step size of zero, is the policy
    bit for bit. log_prob_ref and hidden stay those of the policy below; as under an increment critic with scores q,
    log_norm' = log_norm + log Σ_z pi(z|s)·exp(q_z).

    An ascent has no maximum to stop at (V of a ReLU network grows without end) and no guarantee: grad V points to
    states that look like good prefixes, not to tokens of high next value. `re_control_expected` ascends what is meant.

    Args:
      unembed: f(params["policy"], hidden [B,D]) -> logits [B,V]; `lm.logits` over `policies.language_model(lm)`. It
        reads the parameters of the whole policy below: over a tilt, lambda p, h: lm.logits(p["policy"], h).
      value: f(params["value"], hidden [B,D]) -> [B] or [B,1]; `head_value(lm)` for a value head that
        `train.value --objective td --frozen` trained on the base's hidden states. `linear_value` is static editing:
        the constant step steps·step_size·direction.
      steps: >= 0.
      max_norm: the edit is scaled back to |d| <= max_norm·|h| after each step; None: no cap.
    """
    _check_steps(steps, max_norm)

    def shift(params: Params, step_size: Array, output: StepOutput) -> Array:
        weights = jax.tree.map(_wide, params["value"])

        def total(hidden: Array) -> Array:
            found = value(weights, hidden)
            if found.shape not in (hidden.shape[:1], (*hidden.shape[:1], 1)):
                raise ValueError(f"value: expected one number per row, {hidden.shape[:1]}, found shape {found.shape}")
            return at_least_float32(found).sum()  # rows are independent: the gradient of a sum is each row's own

        return _ascend(jax.grad(total), _hidden_of("re_control", output), step_size, steps, max_norm)

    def output_of(params: Params, step_size: Array, output: StepOutput) -> StepOutput:
        if steps == 0:
            return output
        return _edited(unembed, params["policy"], output, shift(params, step_size, output))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        inner, output = policy.init(params["policy"], rng, prompts_for(prompts, "policy"), max_new_tokens)
        step_size = per_row(params["step_size"], output.log_prob.shape[0], name="step_size")
        return {"policy": inner, "step_size": step_size}, output_of(params, step_size, output)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        inner, output = policy.step(params["policy"], rng, state["policy"], token)
        return {**state, "policy": inner}, output_of(params, state["step_size"], output)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        entry(params, "value")
        _check_step_size(params, prompts)
        check_part(policy, params, prompts, max_new_tokens, "policy")

    return Policy(init, step, None, check, policy.vocab_size)


def re_control_expected(
    policy: Policy, unembed: Unembed, critic: Critic, *, steps: int, max_norm: float | None = None
) -> Policy:
    """Editing towards what RE-Control means: ascent on the expected Q of the edited policy, with Q(s,·) held fixed,

        g(d) = Σ_z pi_d(z|s)·Q(s,z)     ∇g = W^T (pi_d ⊙ (Q − g))

    params {"policy", "critic", "step_size": scalar or [B] >= 0}; the rest as `edit`. Small steps raise E_{pi'}[Q] at
    every state, which `edit` does not promise. A level critic: `tree.critic`, or a Q head (`critics.value`,
    `critics.hidden_value`). It scores the whole vocabulary. A step costs two products with the unembedding.
    """
    _check_steps(steps, max_norm)
    check_same_vocabulary("re_control_expected", policy, critic)
    if critic.kind != "level":
        raise ValueError(f"critic: expected a level critic, whose scores are values, found kind {critic.kind!r}")

    def shift(params: Params, step_size: Array, output: StepOutput, q: Array) -> Array:
        hidden = _hidden_of("re_control_expected", output)
        below = unembed(params["policy"], hidden)

        def total(moved: Array) -> Array:
            probability = jax.nn.softmax(output.log_prob + unembed(params["policy"], moved) - below)
            return (probability * q).sum()

        return _ascend(jax.grad(total), hidden, step_size, steps, max_norm)

    def propose(params: Params, rng: Array, state: dict[str, Any], output: StepOutput, still: Array | None) -> Any:
        q, proposal = critic.score(params["critic"], rng, state["critic"], output, None)
        q = jnp.where(is_supported(output.log_prob), at_least_float32(q), 0)
        if still is not None:
            q = where_rows(still, state["q"], q)
        new = {**state, "critic": proposal, "q": q}
        if steps == 0:
            return new, output
        return new, _edited(unembed, params["policy"], output, shift(params, state["step_size"], output, q))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        below, beside, scoring = jax.random.split(rng, 3)
        inner, output = policy.init(params["policy"], below, prompts_for(prompts, "policy"), max_new_tokens)
        judge = critic.init(params["critic"], beside, prompts_for(prompts, "critic"), max_new_tokens)
        step_size = per_row(params["step_size"], output.log_prob.shape[0], name="step_size")
        return propose(params, scoring, {"policy": inner, "critic": judge, "step_size": step_size}, output, None)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        below, scoring = jax.random.split(rng)
        judge = critic.advance(params["critic"], state["critic"], token)
        inner, output = policy.step(params["policy"], below, state["policy"], token)
        return propose(params, scoring, {**state, "policy": inner, "critic": judge}, output, token < 0)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        _check_step_size(params, prompts)
        check_part(policy, params, prompts, max_new_tokens, "policy")
        check_part(critic, params, prompts, max_new_tokens, "critic")

    return Policy(init, step, None, check, policy.vocab_size or critic.vocab_size)


def head_value(lm: Any) -> Value:
    """V of `edit` from a model's scalar value head, f(params, hidden [B,D]) -> [B], in float32 whatever the model's
    dtype: in bfloat16 small steps would leave V as it was. params: the model's, of which the head is read."""
    if lm.config.head is None or lm.config.head.kind != "value":
        raise ValueError(f"head_value: expected a model with a value head, found {lm.config.head}")
    wide = models.LanguageModel(lm.config, "float64" if lm.dtype == "float64" else "float32")

    def value(params: Params, hidden: Array) -> Array:
        return wide.head({"head": jax.tree.map(_wide, params["head"])}, hidden)[:, 0]

    return value


def linear_value(direction: Array, hidden: Array) -> Array:
    """V(h) = a·h [B], a [D]: its edit is the same for every state, which is static editing. The policy is then
    pi(z|s)·exp(steps·step_size·(W a)_z)/Z."""
    return hidden @ direction


def _ascend(
    gradient: Callable[[Array], Array], hidden: Array, step_size: Array, steps: int, max_norm: float | None
) -> Array:
    """d [B,D] after `steps` steps from 0."""

    def move(_: Any, d: Array) -> Array:
        d = d + step_size[:, None] * gradient(hidden + d)
        if max_norm is None:
            return d
        size, limit = (d**2).sum(axis=-1), max_norm**2 * (hidden**2).sum(axis=-1)
        over = size > limit
        scale = jnp.where(over, jnp.sqrt(limit / jnp.where(over, size, 1)), 1)
        return d * scale[:, None]

    return jax.lax.fori_loop(0, steps, move, jnp.zeros_like(hidden))


def _edited(unembed: Unembed, params: Params, output: StepOutput, d: Array) -> StepOutput:
    hidden = _hidden_of("re_control", output)
    logit = output.log_prob + (unembed(params, hidden + d) - unembed(params, hidden))
    # The old log-sum-exp is 0 up to rounding; with it, d = 0 gives the policy below bit for bit.
    norm = jax.nn.logsumexp(logit, axis=-1) - jax.nn.logsumexp(output.log_prob, axis=-1)
    return output._replace(log_prob=logit - norm[:, None], log_norm=output.log_norm + norm)


def _wide(x: Array) -> Array:
    return at_least_float32(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _hidden_of(name: str, output: StepOutput) -> Array:
    if output.hidden is None:
        raise ValueError(f"{name}: expected a policy that gives hidden states, found hidden = None")
    return at_least_float32(output.hidden)


def _check_steps(steps: int, max_norm: float | None) -> None:
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, found {steps}")
    if max_norm is not None and not 0 < max_norm < np.inf:
        raise ValueError(f"max_norm: expected a finite value > 0 or None, found {max_norm}")


def _check_step_size(params: Params, prompts: Prompts) -> None:
    found = entry(params, "step_size")
    if is_concrete(found) and not np.all((np.asarray(found) >= 0) & np.isfinite(np.asarray(found))):
        raise ValueError(f"step_size: expected a finite value >= 0, found {np.asarray(found)}")
    per_row(found, prompt_index(prompts).shape[0], name="step_size")

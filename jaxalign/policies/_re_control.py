"""RE-Control: gradient ascent of the last hidden state on a value, before it is unembedded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import models
from jaxalign._arrays import at_least_float32, is_supported, per_row, where_rows
from jaxalign._blocks import accept_policy, merged, split, verify_policy
from jaxalign._builders import cached
from jaxalign._checks import check_count, check_part, fields_of, is_concrete
from jaxalign._parts import (
    advance_critic,
    called,
    check_array,
    check_critic_argument,
    check_function_argument,
    check_policy_argument,
    check_proposal,
    check_same_vocabulary,
    score_critic,
    start_critic,
    start_policy,
    step_policy,
)
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.shapes import Hidden, PerPrompt, Scores
from jaxalign.types import Array, ArrayLike, Critic, Params, Policy, Prompts, State, StepOutput


class Unembed(Protocol):
    """Logits [B,V] of hidden states [B,D]. params: those of the whole policy below."""

    def __call__(self, params: Params, hidden: Hidden, /) -> Array: ...


class HiddenValue(Protocol):
    """A value of each hidden state [B,D]: [B] or [B,1]. It is differentiated in `hidden`."""

    def __call__(self, params: Params, hidden: Hidden, /) -> Array: ...


class ReControlParams(NamedTuple):
    """Parameters of `re_control`."""

    policy: Params
    """Those of the policy below."""
    value: Params
    """Those of the value."""
    step_size: ArrayLike
    """>= 0, a scalar or one per prompt [B]."""


class ReControlExpectedParams(NamedTuple):
    """Parameters of `re_control_expected`."""

    policy: Params
    """Those of the policy below."""
    critic: Params
    """Those of the critic."""
    step_size: ArrayLike
    """>= 0, a scalar or one per prompt [B]."""


class ReControlState(NamedTuple):
    """State of `re_control`."""

    policy: State
    """That of the policy below."""
    step_size: PerPrompt
    """[B]."""


class ReControlExpectedState(NamedTuple):
    """State of `re_control_expected`."""

    policy: State
    """That of the policy below."""
    critic: State
    """The critic's proposal for the next token."""
    step_size: PerPrompt
    """[B]."""
    q: Scores
    """[B,V], the scores of the next tokens less the largest of them, 0 outside the support."""


@cached
def re_control(
    policy: Policy, unembed: Unembed, value: HiddenValue, *, num_steps: int, max_norm: float | None = None
) -> Policy:
    """RE-Control: h' = h + d, where d is `num_steps` steps of gradient ascent on V (arXiv 2406.05954, section 4.3):

        d_0 = 0     d_{j+1} = d_j + step_size·∇V(h + d_j)
        log pi'(z|s) = log pi(z|s) + q_z − log Σ_z pi(z|s)·exp(q_z)     q = unembed(h + d) − unembed(h)

    params: ReControlParams(policy, value, step_size), or a dict of these names. h is the policy's hidden state [B,D]
    after the final norm, V(h) the value BEFORE the next token is drawn. The cache is untouched: the edit reaches later
    tokens only through the token that is drawn. Rows are independent; d and V are in at least float32. Without steps,
    or with a step size of zero, the policy is unchanged bit for bit. log_prob_ref and hidden stay those of the policy
    below; as under an increment critic with scores q, log_norm' = log_norm + log Σ_z pi(z|s)·exp(q_z).

    The ascent has no maximum to stop at (V of a ReLU network grows without end) and no guarantee: grad V points to
    states that look like good prefixes, not to tokens of high next value. `re_control_expected` ascends the expected
    value of the next token.

    Args:
      policy: gives hidden states (`StepOutput.hidden`).
      unembed: f(params of the policy below, hidden [B,D]) -> logits [B,V]; `lm.logits` over
        `policies.language_model(lm)`. Over a tilt it reads the tilt's params: lambda p, h: lm.logits(p["policy"], h).
      value: f(params of the value, hidden [B,D]) -> [B] or [B,1]; `head_value(lm)` for a value head that
        `train.value --objective td --frozen` trained on the base's hidden states. `linear_value` is static editing:
        the constant step num_steps·step_size·direction.
      num_steps: >= 0.
      max_norm: the edit is scaled back to |d| <= max_norm·|h| after each step; None: no cap.

    Returns:
      A Policy.

    Raises:
      ValueError: an argument of another kind, num_steps < 0, max_norm <= 0; on the host before tracing, a step_size
        that is negative, not finite or of another shape; while tracing, a policy without hidden states, or a
        function that returns another shape.
    """
    check_policy_argument("policy", policy)
    check_function_argument("unembed", unembed)
    check_function_argument("value", value)
    _check_steps(num_steps, max_norm)

    def shift(params: ReControlParams, step_size: Array, output: StepOutput) -> Array:
        weights = jax.tree.map(_widened, params.value)

        def total(hidden: Array) -> Array:
            found = value(weights, hidden)
            rows = hidden.shape[:1]
            name = f"value ({called(value)})"
            check_array(name, found, (*rows, 1) if np.shape(found)[1:] == (1,) else rows, "one number per row")
            return at_least_float32(found).sum()  # rows are independent: the gradient of a sum is each row's own

        return _ascend(jax.grad(total), _hidden_of("re_control", output), step_size, num_steps, max_norm)

    def output_of(params: ReControlParams, step_size: Array, output: StepOutput) -> StepOutput:
        if num_steps == 0:
            return output
        return _edited(unembed, params.policy, output, shift(params, step_size, output))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        params = fields_of(params, ReControlParams)
        inner, output = start_policy(policy, params.policy, rng, prompts_for(prompts, "policy"), max_new_tokens)
        step_size = per_row(params.step_size, output.log_prob.shape[0], name="step_size")
        return ReControlState(inner, step_size), output_of(params, step_size, output)

    def step(params: Params, rng: Array, state: ReControlState, token: Array) -> tuple[State, StepOutput]:
        params = fields_of(params, ReControlParams)
        inner, output = step_policy(policy, params.policy, rng, state.policy, token)
        return state._replace(policy=inner), output_of(params, state.step_size, output)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        _check_step_size(fields_of(params, ReControlParams).step_size, prompts)
        check_part(policy, params, prompts, max_new_tokens, "policy")

    def verify(
        params: Params,
        rng: Array,
        state: ReControlState,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        params = fields_of(params, ReControlParams)
        outputs, inner = verify_policy(policy, params.policy, rng, state.policy, tokens, mask, below)
        edited = output_of(params, jnp.repeat(state.step_size, tokens.shape[1]), merged(outputs))
        return split(edited, tokens.shape[0]), state._replace(policy=inner)

    def accept(params: Params, proposal: ReControlState, count: Array) -> State:
        params = fields_of(params, ReControlParams)
        return proposal._replace(policy=accept_policy(policy, params.policy, proposal.policy, count))

    edited_policy = Policy(init, step, None, check, policy.vocab_size, policy.eos_ids)
    return edited_policy if policy.verify is None else edited_policy._replace(verify=verify, accept=accept)


@cached
def re_control_expected(
    policy: Policy, unembed: Unembed, critic: Critic, *, num_steps: int, max_norm: float | None = None
) -> Policy:
    """RE-Control on the expected Q of the edited policy, with Q(s,·) held fixed:

        g(d) = Σ_z pi_d(z|s)·Q(s,z)     ∇g = W^T (pi_d ⊙ (Q − g))

    params: ReControlExpectedParams(policy, critic, step_size), or a dict of these names. Small steps raise E_{pi'}[Q]
    at every state, which `re_control` does not promise. A step costs two products with the unembedding.

    Args:
      policy: gives hidden states.
      unembed: as in `re_control`.
      critic: a level critic that scores the whole vocabulary: `tree.critic`, or a Q head (`critics.value`,
        `critics.hidden_value`).
      num_steps: >= 0.
      max_norm: as in `re_control`.

    Returns:
      A Policy.

    Raises:
      ValueError: as `re_control`; a critic of increments; two vocabularies.
    """
    check_policy_argument("policy", policy)
    check_function_argument("unembed", unembed)
    check_critic_argument("critic", critic)
    _check_steps(num_steps, max_norm)
    check_same_vocabulary("re_control_expected", policy, critic)
    if critic.kind != "level":
        raise ValueError(f"critic: expected a level critic, whose scores are values, found kind {critic.kind!r}")

    def shift(params: ReControlExpectedParams, step_size: Array, output: StepOutput, q: Array) -> Array:
        hidden = _hidden_of("re_control_expected", output)
        below = _logits(unembed, params.policy, hidden, output)

        def total(moved: Array) -> Array:
            logits = _logits(unembed, params.policy, moved, output)
            return (jax.nn.softmax(output.log_prob + logits - below) * q).sum()

        return _ascend(jax.grad(total), hidden, step_size, num_steps, max_norm)

    def propose(
        params: ReControlExpectedParams,
        rng: Array,
        state: ReControlExpectedState,
        output: StepOutput,
        frozen: Array | None,
    ) -> tuple[ReControlExpectedState, StepOutput]:
        q, proposal = score_critic(critic, params.critic, rng, state.critic, output, None)
        inside = is_supported(output.log_prob)
        # Less the largest: g's gradient knows differences alone, which a large level would round away.
        top = jnp.where(inside, q, -jnp.inf).max(axis=-1, keepdims=True)
        q = jnp.where(inside, at_least_float32(q) - jnp.where(jnp.isfinite(top), top, 0), 0)
        if frozen is not None:
            q = where_rows(frozen, state.q, q)
        state = state._replace(critic=proposal, q=q)
        if num_steps == 0:
            return state, output
        return state, _edited(unembed, params.policy, output, shift(params, state.step_size, output, q))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        params = fields_of(params, ReControlExpectedParams)
        below, beside, scoring = jax.random.split(rng, 3)
        inner, output = start_policy(policy, params.policy, below, prompts_for(prompts, "policy"), max_new_tokens)
        scorer = start_critic(critic, params.critic, beside, prompts_for(prompts, "critic"), max_new_tokens)
        step_size = per_row(params.step_size, output.log_prob.shape[0], name="step_size")
        unscored = jnp.zeros((step_size.shape[0], 0))  # `propose` puts the scores of the first step here
        state = ReControlExpectedState(inner, scorer, step_size, unscored)
        return propose(params, scoring, state, output, None)

    def step(params: Params, rng: Array, state: ReControlExpectedState, token: Array) -> tuple[State, StepOutput]:
        params = fields_of(params, ReControlExpectedParams)
        below, scoring = jax.random.split(rng)
        scorer = advance_critic(critic, params.critic, state.critic, token)
        inner, output = step_policy(policy, params.policy, below, state.policy, token)
        moved = state._replace(policy=inner, critic=scorer)
        moved, output = propose(params, scoring, moved, output, token < 0)
        check_proposal(critic, state.critic, moved.critic)
        return moved, output

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        _check_step_size(fields_of(params, ReControlExpectedParams).step_size, prompts)
        check_part(policy, params, prompts, max_new_tokens, "policy")
        check_part(critic, params, prompts, max_new_tokens, "critic")

    return Policy(init, step, None, check, policy.vocab_size or critic.vocab_size, policy.eos_ids)


@cached
def head_value(lm: models.LanguageModel) -> HiddenValue:
    """The V of `re_control` that reads a model's scalar value head: f(params, hidden [B,D]) -> [B].

    It computes in float32 whatever the model's dtype: in bfloat16 small steps would leave V as it was. params: the
    model's, of which the head is read.

    Args:
      lm: a model with a scalar value head.

    Returns:
      The value function.

    Raises:
      ValueError: a model without a scalar value head.
    """
    if lm.config.head is None or lm.config.head.kind != "value":
        raise ValueError(f"head_value: expected a model with a value head, found {lm.config.head}")
    wide = models.LanguageModel(lm.config, "float64" if lm.dtype == "float64" else "float32")

    def value(params: Params, hidden: Array, /) -> Array:
        return wide.head({"head": jax.tree.map(_widened, params["head"])}, hidden)[:, 0]

    return value


def linear_value(direction: Array, hidden: Array, /) -> Array:
    """Gives the value V(h) = a·h, whose edit is the same for every state: static editing.

    The policy is then pi(z|s)·exp(num_steps·step_size·(W a)_z)/Z.

    Args:
      direction: a [D].
      hidden: [B,D].

    Returns:
      [B].
    """
    return hidden @ direction


def _ascend(
    gradient: Callable[[Array], Array], hidden: Array, step_size: Array, num_steps: int, max_norm: float | None
) -> Array:
    """d [B,D] after `num_steps` steps from 0."""

    def move(_: Array, d: Array) -> Array:
        d = d + step_size[:, None] * gradient(hidden + d)
        if max_norm is None:
            return d
        size, limit = (d**2).sum(axis=-1), max_norm**2 * (hidden**2).sum(axis=-1)
        over = size > limit
        scale = jnp.where(over, jnp.sqrt(limit / jnp.where(over, size, 1)), 1)
        return d * scale[:, None]

    shift: Array = jax.lax.fori_loop(0, num_steps, move, jnp.zeros_like(hidden))
    return shift


def _edited(unembed: Unembed, params: Params, output: StepOutput, d: Array) -> StepOutput:
    hidden = _hidden_of("re_control", output)
    moved, unmoved = (_logits(unembed, params, x, output) for x in (hidden + d, hidden))
    logit = output.log_prob + (moved - unmoved)
    # The old log-sum-exp is 0 up to rounding; with it, d = 0 gives the policy below bit for bit.
    norm = jax.nn.logsumexp(logit, axis=-1) - jax.nn.logsumexp(output.log_prob, axis=-1)
    return output._replace(log_prob=logit - norm[:, None], log_norm=output.log_norm + norm)


def _logits(unembed: Unembed, params: Params, hidden: Array, output: StepOutput) -> Array:
    logits = unembed(params, hidden)
    check_array(f"unembed ({called(unembed)})", logits, output.log_prob.shape, "a logit per row and token")
    return logits


def _widened(x: Array) -> Array:
    return at_least_float32(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _hidden_of(name: str, output: StepOutput) -> Array:
    if output.hidden is None:
        raise ValueError(f"{name}: expected a policy that gives hidden states, found hidden = None")
    return at_least_float32(output.hidden)


def _check_steps(num_steps: int, max_norm: float | None) -> None:
    check_count("num_steps", num_steps, least=0)
    if max_norm is not None and not 0 < max_norm < np.inf:
        raise ValueError(f"max_norm: expected a finite value > 0 or None, found {max_norm}")


def _check_step_size(found: ArrayLike, prompts: Prompts) -> None:
    if is_concrete(found) and not np.all((np.asarray(found) >= 0) & np.isfinite(np.asarray(found))):
        raise ValueError(f"step_size: expected a finite value >= 0, found {np.asarray(found)}")
    per_row(found, prompt_index(prompts).shape[0], name="step_size")

"""Temperature, top-p, top-k, min-p and locally typical tokens of any Policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import NEGATIVE, is_supported, largest, per_row
from jaxalign._blocks import accept_policy, merged, split, verify_policy
from jaxalign._builders import cached
from jaxalign._checks import check_integer, check_part, fields_of, is_concrete
from jaxalign._parts import check_policy_argument, start_policy, step_policy
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.shapes import PerPrompt
from jaxalign.types import Array, ArrayLike, Params, Policy, Prompts, State, StepOutput


class TemperatureParams(NamedTuple):
    """Parameters of `temperature`."""

    policy: Params
    """Those of the policy below."""
    temperature: ArrayLike
    """>= 0, a scalar or one per prompt [B]; 0 is greedy."""


class TopPParams(NamedTuple):
    """Parameters of `top_p`."""

    policy: Params
    """Those of the policy below."""
    top_p: ArrayLike
    """In (0, 1], a scalar or one per prompt [B]."""


class MinPParams(NamedTuple):
    """Parameters of `min_p`."""

    policy: Params
    """Those of the policy below."""
    min_p: ArrayLike
    """In (0, 1], a scalar or one per prompt [B]."""


class TypicalParams(NamedTuple):
    """Parameters of `typical`."""

    policy: Params
    """Those of the policy below."""
    typical: ArrayLike
    """The mass to keep, in (0, 1], a scalar or one per prompt [B]."""


class TransformState(NamedTuple):
    """State of `temperature`, `top_p`, `min_p` and `typical`."""

    policy: State
    """That of the policy below."""
    value: PerPrompt
    """[B], the temperature, the mass or the share of each row."""


@cached
def temperature(policy: Policy) -> Policy:
    """The tempered policy pi'(z|s) ∝ pi(z|s)^{1/temperature}; 0 is greedy (the first of equal tokens).

    params: TemperatureParams(policy, temperature), or a dict of these names. The increments below are tempered too, so
    that log_norm' = log_norm/temperature + logsumexp(log pi/temperature) is the weight for the tempered target. Greedy
    is the truncation to one token: log_norm' = log_norm + max log pi.

    Args:
      policy: the policy below.

    Returns:
      A Policy.

    Raises:
      ValueError: `policy` is no Policy; on the host before tracing, a temperature < 0 or of another shape.
    """

    def apply(value: Array, output: StepOutput) -> StepOutput:
        greedy = value <= 0
        divisor = jnp.where(greedy, 1, value).astype(output.log_prob.dtype)
        scaled = output.log_prob / divisor[:, None]
        norm = jax.nn.logsumexp(scaled, axis=-1)
        best = jnp.argmax(output.log_prob, axis=-1)
        only = jnp.where(jnp.arange(scaled.shape[-1]) == best[:, None], 0, NEGATIVE)
        # NEGATIVE/temperature is no longer far enough down to count as outside the support.
        scaled = jnp.where(is_supported(output.log_prob), scaled - norm[:, None], NEGATIVE)
        log_prob = jnp.where(greedy[:, None], only, scaled).astype(output.log_prob.dtype)
        log_norm = jnp.where(greedy, output.log_norm + output.log_prob.max(axis=-1), output.log_norm / divisor + norm)
        return output._replace(log_prob=log_prob, log_norm=log_norm)

    return _per_prompt(TemperatureParams, policy, apply, lambda value: value >= 0, "a value >= 0")


@cached
def top_p(policy: Policy) -> Policy:
    """The nucleus: the smallest set of most probable tokens whose mass reaches p, renormalised; never empty.

    params: TopPParams(policy, top_p), or a dict of these names. log_norm' = log_norm + log(kept mass).

    Args:
      policy: the policy below.

    Returns:
      A Policy.

    Raises:
      ValueError: `policy` is no Policy; on the host before tracing, a top_p outside (0, 1] or of another shape.
    """

    def apply(value: Array, output: StepOutput) -> StepOutput:
        vocab = output.log_prob.shape[-1]
        width = min(vocab, _NUCLEUS)
        covered = jnp.exp(largest(output.log_prob, width)[0]).sum(axis=-1) >= value
        # Sorting a whole vocabulary costs more than a step of a small model, and is rarely needed.
        keep = jax.lax.cond(
            covered.all() | (width == vocab),
            lambda: _nucleus(output.log_prob, value, width),
            lambda: _wide_nucleus(output.log_prob, value),
        )
        # The whole mass may round to less than 1, and to more before the last token.
        return _truncate(output, keep | ((value >= 1)[:, None] & is_supported(output.log_prob)))

    return _per_prompt(TopPParams, policy, apply, lambda value: (value > 0) & (value <= 1), "a value in (0, 1]")


_NUCLEUS = 256  # tokens that are looked at before the whole vocabulary is sorted


def _nucleus(log_prob: Array, p: Array, k: int) -> Array:
    """Tokens [B,V] among the k most probable that are kept: while the mass before them is short of p [B]."""
    top, order = largest(log_prob, k)
    mass = jnp.exp(top)
    kept = (jnp.cumsum(mass, axis=-1) - mass < p[:, None]).at[:, 0].set(True)
    return jax.vmap(lambda o, keep: jnp.zeros(log_prob.shape[-1], bool).at[o].set(keep))(order, kept)


def _wide_nucleus(log_prob: Array, p: Array) -> Array:
    """As `_nucleus` over the whole vocabulary, without a sort: the probability of the last token kept is bisected.

    Non-negative floats are ordered as their bit patterns are, so that as many halvings as a float has bits end at the
    largest probability v with mass(>= v) >= p; of the tokens at v the first by id are kept while mass is missing.
    """
    prob = jnp.exp(log_prob)
    code = jnp.int64 if prob.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(prob, code)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket  # mass(bits >= low) >= p, or low = 0; mass(bits >= high) < p
        middle = low + (high - low) // 2
        enough = jnp.where(bits >= middle[:, None], prob, 0).sum(axis=-1) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = jnp.zeros(p.shape, code), bits.max(axis=-1) + 1
    edge = jax.lax.fori_loop(0, 8 * prob.dtype.itemsize, halve, start)[0][:, None]
    above, level = bits > edge, jnp.where(bits == edge, prob, 0)
    missing = p - jnp.where(above, prob, 0).sum(axis=-1)
    kept: Array = above | ((bits == edge) & (jnp.cumsum(level, axis=-1) - level < missing[:, None]))
    return kept


@cached
def top_k(policy: Policy, k: int) -> Policy:
    """The k most probable tokens, renormalised (equal ones: lower ids first). params: the policy's own.

    log_norm' = log_norm + log(kept mass).

    Args:
      policy: the policy below.
      k: tokens that are kept, in [1, V].

    Returns:
      A Policy.

    Raises:
      ValueError: `policy` is no Policy, or k is no integer in [1, V].
    """
    check_policy_argument("policy", policy)
    check_integer("k", k)
    if k < 1 or (policy.vocab_size is not None and k > policy.vocab_size):
        raise ValueError(f"k: expected 1 to the vocabulary's {policy.vocab_size} tokens, found {k}")

    def apply(output: StepOutput) -> StepOutput:
        if k > output.log_prob.shape[-1]:
            raise ValueError(f"k: expected at most {output.log_prob.shape[-1]} tokens, found {k}")
        kept = largest(output.log_prob, k)[1]
        keep = jax.vmap(lambda index: jnp.zeros(output.log_prob.shape[-1], bool).at[index].set(True))(kept)
        return _truncate(output, keep)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        state, output = start_policy(policy, params, rng, prompts, max_new_tokens)
        return state, apply(output)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        state, output = step_policy(policy, params, rng, state, token)
        return state, apply(output)

    def verify(
        params: Params,
        rng: Array,
        state: State,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        outputs, proposal = verify_policy(policy, params, rng, state, tokens, mask, below)
        return split(apply(merged(outputs)), tokens.shape[0]), proposal

    def accept(params: Params, proposal: State, count: Array) -> State:
        return accept_policy(policy, params, proposal, count)

    cut = Policy(init, step, None, policy.check, policy.vocab_size, policy.eos_ids)
    return cut if policy.verify is None else cut._replace(verify=verify, accept=accept)


@cached
def min_p(policy: Policy) -> Policy:
    """The tokens at least min_p times as probable as the most probable one, renormalised (arXiv 2407.01082; the
    plausible tokens of contrastive decoding, arXiv 2210.15097).

    params: MinPParams(policy, min_p), or a dict of these names. log_norm' = log_norm + log(kept mass).

    Args:
      policy: the policy below.

    Returns:
      A Policy.

    Raises:
      ValueError: `policy` is no Policy; on the host before tracing, a min_p outside (0, 1] or of another shape.
    """

    def apply(value: Array, output: StepOutput) -> StepOutput:
        most = output.log_prob.max(axis=-1, keepdims=True)
        # Tested for below, not for above: a NaN must show in what is kept.
        return _truncate(output, ~(output.log_prob < most + jnp.log(value)[:, None]))

    return _per_prompt(MinPParams, policy, apply, lambda value: (value > 0) & (value <= 1), "a value in (0, 1]")


@cached
def typical(policy: Policy) -> Policy:
    """The locally typical tokens (arXiv 2202.00666): in the order of |−log pi(z|s) − H(s)|, H the entropy, the shortest
    list whose mass reaches `typical`, renormalised; of equal ones the lower ids first, never empty.

    params: TypicalParams(policy, typical), or a dict of these names. log_norm' = log_norm + log(kept mass).

    Args:
      policy: the policy below.

    Returns:
      A Policy.

    Raises:
      ValueError: `policy` is no Policy; on the host before tracing, a mass outside (0, 1] or of another shape.
    """

    def apply(value: Array, output: StepOutput) -> StepOutput:
        log_prob = jax.lax.stop_gradient(output.log_prob)
        inside = is_supported(log_prob)
        surprise = jnp.where(inside, -log_prob, 0)
        entropy = (jnp.where(inside, jnp.exp(-surprise), 0) * surprise).sum(axis=-1, keepdims=True)
        order = jnp.argsort(jnp.where(inside, jnp.abs(surprise - entropy), jnp.inf), axis=-1, stable=True)
        mass = jnp.exp(jnp.take_along_axis(log_prob, order, axis=-1))
        kept = (jnp.cumsum(mass, axis=-1) - mass < value[:, None]).at[:, 0].set(True)
        keep = jax.vmap(lambda index, row: jnp.zeros(row.shape, bool).at[index].set(row))(order, kept)
        # The whole mass may round to less than 1, and to more before the last token.
        return _truncate(output, inside & (keep | (value >= 1)[:, None]))

    return _per_prompt(TypicalParams, policy, apply, lambda value: (value > 0) & (value <= 1), "a value in (0, 1]")


def _truncate(output: StepOutput, keep: Array) -> StepOutput:
    """Keeps the tokens of `keep` [B,V] and renormalises; the kept mass enters log_norm."""
    log_kept = jax.nn.logsumexp(jnp.where(keep, output.log_prob, NEGATIVE), axis=-1)
    log_prob = jnp.where(keep, output.log_prob - log_kept[:, None], NEGATIVE)
    return output._replace(log_prob=log_prob, log_norm=output.log_norm + log_kept)


def _per_prompt(
    fields: type[TemperatureParams] | type[TopPParams] | type[MinPParams] | type[TypicalParams],
    policy: Policy,
    apply: Callable[[Array, StepOutput], StepOutput],
    valid: Callable[[np.ndarray], np.ndarray],
    expected: str,
) -> Policy:
    """A transform of the output by one number per prompt, the second of `fields`, kept in the state (law 3)."""
    check_policy_argument("policy", policy)
    name = fields._fields[1]

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        policy_params, value = fields_of(params, fields)
        inner, output = start_policy(policy, policy_params, rng, prompts_for(prompts, "policy"), max_new_tokens)
        value = per_row(value, output.log_prob.shape[0], name=name)
        return TransformState(inner, value), apply(value, output)

    def step(params: Params, rng: Array, state: TransformState, token: Array) -> tuple[State, StepOutput]:
        # A token that this transform gave probability zero is passed on all the same: the state below keeps its law.
        inner, output = step_policy(policy, fields_of(params, fields)[0], rng, state.policy, token)
        return state._replace(policy=inner), apply(state.value, output)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        value = fields_of(params, fields)[1]
        if is_concrete(value) and not np.all(valid(np.asarray(value))):
            raise ValueError(f"{name}: expected {expected}, found {np.asarray(value)}")
        per_row(value, prompt_index(prompts).shape[0], name=name)
        check_part(policy, params, prompts, max_new_tokens, "policy")

    def verify(
        params: Params,
        rng: Array,
        state: TransformState,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        inner = fields_of(params, fields)[0]
        outputs, proposal = verify_policy(policy, inner, rng, state.policy, tokens, mask, below)
        changed = apply(jnp.repeat(state.value, tokens.shape[1]), merged(outputs))
        return split(changed, tokens.shape[0]), state._replace(policy=proposal)

    def accept(params: Params, proposal: TransformState, count: Array) -> State:
        inner = fields_of(params, fields)[0]
        return proposal._replace(policy=accept_policy(policy, inner, proposal.policy, count))

    transformed = Policy(init, step, None, check, policy.vocab_size, policy.eos_ids)
    return transformed if policy.verify is None else transformed._replace(verify=verify, accept=accept)

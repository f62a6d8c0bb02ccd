"""One Policy of several: the mixture of their laws over responses, and the product of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import NEGATIVE, add_scores, at_least_float32, is_supported
from jaxalign._blocks import accept_policy, at, joined, merged, split, verify_policy
from jaxalign._builders import cached
from jaxalign._checks import ParamsError, check_below, fields_of, is_concrete
from jaxalign._parts import check_policy_argument, start_policy, step_policy
from jaxalign.prompts import prompt_index, prompts_at, prompts_for
from jaxalign.types import Array, ArrayLike, HostCheck, Params, Policy, Prompts, State, StepOutput


class PoliciesParams(NamedTuple):
    """Parameters of `mix` and `product`."""

    policies: Sequence[Params]
    """Those of each policy, in order."""
    weights: ArrayLike
    """[m], or one row per prompt [B,m]; those of `mix` are > 0 and need not sum to 1."""


class MixState(NamedTuple):
    """State of `mix`."""

    policies: tuple[State, ...]
    """That of each policy."""
    log_weights: Array
    """[B,m], the log-probability that each policy wrote the text so far."""
    log_probs: Array
    """[B,m,V], of each policy."""


class ProductState(NamedTuple):
    """State of `product`."""

    policies: tuple[State, ...]
    """That of each policy."""
    weights: Array
    """[B,m]."""


def mix(policies: Sequence[Policy], *, reference: int | None = None) -> Policy:
    """The mixture of whole-response laws, pi(y|x) = Σ_i w_i·pi_i(y|x)/Σ_i w_i: as if one policy, drawn by its weight,
    had written the whole response.

    params: PoliciesParams(policies, weights), or a dict of these names. log pi(z|s) = log Σ_i w_i(s)·pi_i(z|s), where
    w_i(s) ∝ w_i·pi_i(s) is the probability that policy i wrote the text so far. With fixed weights it would be another
    law. log_norm is 0.

    Args:
      policies: at least one, over one vocabulary.
      reference: the policy whose base is that of the mixture; None: the mixture is its own base.

    Returns:
      A Policy, which ends responses as the first.

    Raises:
      ValueError: no policies, something that is no Policy, two vocabularies, or a reference that is none of them; on
        the host before tracing, weights of another shape or not > 0.
    """
    return _mix(_listed("mix", policies), reference)


@cached
def _mix(policies: tuple[Policy, ...], reference: int | None) -> Policy:
    vocab_size = _vocab_size(policies)
    if reference is not None and reference not in range(len(policies)):
        raise ValueError(f"reference: expected one of the policies, 0 to {len(policies) - 1}, found {reference!r}")

    def output(state: MixState, outputs: Sequence[StepOutput]) -> StepOutput:
        total = jax.nn.logsumexp(state.log_weights[..., None] + state.log_probs, axis=1)
        # Weighted sums of log 0 may leave it just short of log 0.
        log_prob = jnp.where(is_supported(total), total, NEGATIVE)
        ref = log_prob if reference is None else outputs[reference].log_prob_ref
        return StepOutput(log_prob, ref, jnp.zeros(log_prob.shape[:1], log_prob.dtype))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        given = _fields(params, len(policies))
        states, outputs = _start(policies, given, rng, prompts, max_new_tokens)
        log_weights = jax.nn.log_softmax(jnp.log(_weights(given, prompt_index(prompts).shape[0])))
        state = MixState(states, log_weights, jnp.stack([out.log_prob for out in outputs], axis=1))
        return state, output(state, outputs)

    def step(params: Params, rng: Array, state: MixState, token: Array) -> tuple[State, StepOutput]:
        states, outputs = _step(policies, _fields(params, len(policies)), rng, state.policies, token)
        chosen = jnp.take_along_axis(state.log_probs, jnp.maximum(token, 0)[:, None, None], axis=2)[..., 0]
        moved = jax.nn.log_softmax(jnp.maximum(state.log_weights + chosen, NEGATIVE), axis=-1)
        log_weights = jnp.where(token[:, None] < 0, state.log_weights, moved).astype(state.log_weights.dtype)
        state = MixState(states, log_weights, jnp.stack([out.log_prob for out in outputs], axis=1))
        return state, output(state, outputs)

    def verify(
        params: Params,
        rng: Array,
        state: MixState,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        del below
        given = _fields(params, len(policies))
        proposals, outputs = _verify(policies, given, rng, state.policies, tokens, mask)
        log_probs = jnp.stack([out.log_prob for out in outputs], axis=2)  # [B,S,m,V]
        before = joined(state.log_probs, log_probs)[:, :-1]
        chosen = jnp.take_along_axis(before, jnp.maximum(tokens, 0)[..., None, None], axis=3)[..., 0]
        # Weights of a text are the prior ones times the probabilities of all of it.
        told = jnp.cumsum(jnp.where(mask[..., None], chosen, 0), axis=1)
        moved = jax.nn.log_softmax(jnp.maximum(state.log_weights[:, None] + told, NEGATIVE), axis=-1)
        moved = moved.astype(state.log_weights.dtype)
        rows = MixState((), *merged((moved, log_probs)))
        found = split(output(rows, [merged(out) for out in outputs]), tokens.shape[0])
        return found, MixState(proposals, joined(state.log_weights, moved), joined(state.log_probs, log_probs))

    def accept(params: Params, proposal: MixState, count: Array) -> State:
        states = _accept(policies, _fields(params, len(policies)), proposal.policies, count)
        return MixState(states, *at((proposal.log_weights, proposal.log_probs), count))

    mixed = Policy(init, step, None, _check(policies, positive=True), vocab_size, policies[0].eos_ids)
    return mixed._replace(verify=verify, accept=accept) if _in_blocks(policies) else mixed


def product(policies: Sequence[Policy]) -> Policy:
    """The weighted product of policies, step by step: log pi(z|s) = Σ_i w_i·log pi_i(z|s) − log Z(s).

    params: PoliciesParams(policies, weights), or a dict of these names. Weights of any sign. A token outside the
    support of a policy whose weight is not 0 is outside the product's; where that leaves none, the first policy stays
    as it is, with a log_norm of log 0. The base is the first policy's, and log_norm' = Σ_i w_i·log_norm_i + log Z.

    Args:
      policies: at least one, over one vocabulary.

    Returns:
      A Policy, which ends responses as the first.

    Raises:
      ValueError: no policies, something that is no Policy, or two vocabularies; on the host before tracing, weights of
        another shape or not finite.
    """
    return _product(_listed("product", policies))


@cached
def _product(policies: tuple[Policy, ...]) -> Policy:
    vocab_size = _vocab_size(policies)

    def output(weights: Array, outputs: Sequence[StepOutput]) -> StepOutput:
        logit = add_scores([at_least_float32(out.log_prob) for out in outputs], weights)
        inside = is_supported(logit)
        empty = ~inside.any(axis=-1, keepdims=True)
        norm = jax.nn.logsumexp(jnp.where(empty, 0, logit), axis=-1)
        log_prob = jnp.where(inside, logit - norm[:, None], NEGATIVE)
        log_prob = jnp.where(empty, outputs[0].log_prob, log_prob)
        below = (weights * jnp.stack([out.log_norm for out in outputs], axis=1)).sum(axis=1)
        return outputs[0]._replace(log_prob=log_prob, log_norm=jnp.where(empty[:, 0], NEGATIVE, below + norm))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        given = _fields(params, len(policies))
        states, outputs = _start(policies, given, rng, prompts, max_new_tokens)
        state = ProductState(states, _weights(given, prompt_index(prompts).shape[0]))
        return state, output(state.weights, outputs)

    def step(params: Params, rng: Array, state: ProductState, token: Array) -> tuple[State, StepOutput]:
        states, outputs = _step(policies, _fields(params, len(policies)), rng, state.policies, token)
        return state._replace(policies=states), output(state.weights, outputs)

    def verify(
        params: Params,
        rng: Array,
        state: ProductState,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        del below
        given = _fields(params, len(policies))
        proposals, outputs = _verify(policies, given, rng, state.policies, tokens, mask)
        weights = jnp.repeat(state.weights, tokens.shape[1], axis=0)
        found = split(output(weights, [merged(out) for out in outputs]), tokens.shape[0])
        return found, state._replace(policies=proposals)

    def accept(params: Params, proposal: ProductState, count: Array) -> State:
        given = _fields(params, len(policies))
        return proposal._replace(policies=_accept(policies, given, proposal.policies, count))

    multiplied = Policy(init, step, None, _check(policies, positive=False), vocab_size, policies[0].eos_ids)
    return multiplied._replace(verify=verify, accept=accept) if _in_blocks(policies) else multiplied


def _listed(name: str, policies: Sequence[Policy]) -> tuple[Policy, ...]:
    """The policies as a tuple, which has a hash. ValueError for one Policy, which is a tuple itself."""
    if isinstance(policies, Policy):
        raise ValueError(f"{name}: policies: expected a sequence of policies, found one Policy")
    for i, policy in enumerate(policies):
        check_policy_argument(f"policies[{i}]", policy)
    if not policies:
        raise ValueError("policies: expected at least one policy, found none")
    return tuple(policies)


def _vocab_size(policies: Sequence[Policy]) -> int | None:
    sizes = sorted({policy.vocab_size for policy in policies if policy.vocab_size is not None})
    if len(sizes) > 1:
        raise ValueError(f"policies: expected one vocabulary, found {sizes} tokens")
    return sizes[0] if sizes else None


def _fields(params: Params, count: int) -> PoliciesParams:
    found = fields_of(params, PoliciesParams)
    if not isinstance(found.policies, Sequence):
        raise ParamsError(f"expected a sequence, found {type(found.policies).__name__}", "['policies']")
    if len(found.policies) != count:
        raise ParamsError(f"expected parameters of {count} policies, found {len(found.policies)}", "['policies']")
    return found


def _weights(params: PoliciesParams, batch: int) -> Array:
    weights, count = at_least_float32(params.weights), len(params.policies)
    if weights.shape not in ((count,), (batch, count)):
        raise ValueError(
            f"weights: expected shape ({count},) or ({batch}, {count}), one weight per policy, found {weights.shape}"
        )
    return jnp.broadcast_to(weights, (batch, count))


def _start(
    policies: Sequence[Policy], params: PoliciesParams, rng: Array, prompts: Prompts, max_new_tokens: int
) -> tuple[tuple[State, ...], list[StepOutput]]:
    prompts, keys = prompts_for(prompts, "policies"), jax.random.split(rng, len(policies))
    begun = [
        start_policy(policy, params.policies[i], keys[i], prompts_at(prompts, i), max_new_tokens)
        for i, policy in enumerate(policies)
    ]
    return tuple(state for state, _ in begun), [output for _, output in begun]


def _step(
    policies: Sequence[Policy], params: PoliciesParams, rng: Array, states: Sequence[State], token: Array
) -> tuple[tuple[State, ...], list[StepOutput]]:
    keys = jax.random.split(rng, len(policies))
    moved = [step_policy(policy, params.policies[i], keys[i], states[i], token) for i, policy in enumerate(policies)]
    return tuple(state for state, _ in moved), [output for _, output in moved]


def _in_blocks(policies: Sequence[Policy]) -> bool:
    return any(policy.verify is not None for policy in policies)


def _verify(
    policies: Sequence[Policy],
    params: PoliciesParams,
    rng: Array,
    states: Sequence[State],
    tokens: Array,
    mask: Array,
) -> tuple[tuple[State, ...], list[StepOutput]]:
    keys = jax.random.split(rng, len(policies))
    found = [
        verify_policy(policy, params.policies[i], keys[i], states[i], tokens, mask) for i, policy in enumerate(policies)
    ]
    return tuple(proposal for _, proposal in found), [outputs for outputs, _ in found]


def _accept(
    policies: Sequence[Policy], params: PoliciesParams, proposals: Sequence[State], count: Array
) -> tuple[State, ...]:
    each = zip(policies, params.policies, proposals, strict=True)
    return tuple(accept_policy(policy, own, proposal, count) for policy, own, proposal in each)


def _check(policies: Sequence[Policy], *, positive: bool) -> HostCheck:
    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        given, own = _fields(params, len(policies)), prompts_for(prompts, "policies")
        weights = _weights(given, prompt_index(prompts).shape[0])
        if is_concrete(weights):
            values = np.asarray(weights)
            if not np.all(np.isfinite(values) & ((values > 0) | (not positive))):
                wanted = "finite numbers > 0" if positive else "finite numbers"
                raise ValueError(f"weights: expected {wanted}, found {values}")
        for i, policy in enumerate(policies):
            check_below(policy, given.policies[i], prompts_at(own, i), max_new_tokens, f"['policies'][{i}]")

    return check

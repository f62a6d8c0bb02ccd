"""A Policy with another one as its base."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxalign._blocks import accept_policy, verify_policy
from jaxalign._builders import cached
from jaxalign._checks import check_part, fields_of
from jaxalign._parts import check_policy_argument, check_same_vocabulary, start_policy, step_policy
from jaxalign.prompts import prompts_for
from jaxalign.types import Array, Completions, Params, Policy, Prompts, State, StepOutput


class ReferenceParams(NamedTuple):
    """Parameters of `with_reference`."""

    policy: Params
    """Those of the policy that is drawn from."""
    reference: Params
    """Those of its base."""


class ReferenceState(NamedTuple):
    """State of `with_reference`."""

    policy: State
    """That of the policy that is drawn from."""
    reference: State
    """That of its base."""


@cached
def with_reference(policy: Policy, reference: Policy) -> Policy:
    """`policy` with log_prob_ref of another model: a DPO or RL model is not its own base.

    The KL of a decoder is then against the reference; log_norm stays the policy's own. params:
    ReferenceParams(policy, reference), or a dict of these names.

    Args:
      policy: what is drawn from.
      reference: the base that KL is measured to, of the same vocabulary.

    Returns:
      A Policy.

    Raises:
      ValueError: an argument that is no Policy, or two vocabularies.
    """
    check_policy_argument("policy", policy)
    check_policy_argument("reference", reference)
    check_same_vocabulary("with_reference", policy, reference)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        policy_params, base_params = fields_of(params, ReferenceParams)
        one, other = jax.random.split(rng)
        inner, output = start_policy(policy, policy_params, one, prompts_for(prompts, "policy"), max_new_tokens)
        inner_ref, base = start_policy(reference, base_params, other, prompts_for(prompts, "reference"), max_new_tokens)
        return ReferenceState(inner, inner_ref), output._replace(log_prob_ref=base.log_prob)

    def step(params: Params, rng: Array, state: ReferenceState, token: Array) -> tuple[State, StepOutput]:
        policy_params, base_params = fields_of(params, ReferenceParams)
        one, other = jax.random.split(rng)
        inner, output = step_policy(policy, policy_params, one, state.policy, token)
        inner_ref, base = step_policy(reference, base_params, other, state.reference, token)
        return ReferenceState(inner, inner_ref), output._replace(log_prob_ref=base.log_prob)

    def log_prob(params: Params, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
        assert policy.log_prob is not None
        assert reference.log_prob is not None
        parts = fields_of(params, ReferenceParams)
        completions = policy.log_prob(parts.policy, prompts_for(prompts, "policy"), tokens, mask)
        base = reference.log_prob(parts.reference, prompts_for(prompts, "reference"), tokens, mask)
        # The exact KL needs both distributions at every position; the parallel form keeps neither.
        return completions._replace(log_prob_ref=base.log_prob, kl=None)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        fields_of(params, ReferenceParams)
        check_part(policy, params, prompts, max_new_tokens, "policy")
        check_part(reference, params, prompts, max_new_tokens, "reference")

    def verify(
        params: Params,
        rng: Array,
        state: ReferenceState,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        del below
        policy_params, base_params = fields_of(params, ReferenceParams)
        one, other = jax.random.split(rng)
        outputs, inner = verify_policy(policy, policy_params, one, state.policy, tokens, mask)
        base, inner_ref = verify_policy(reference, base_params, other, state.reference, tokens, mask)
        return outputs._replace(log_prob_ref=base.log_prob), ReferenceState(inner, inner_ref)

    def accept(params: Params, proposal: ReferenceState, count: Array) -> State:
        policy_params, base_params = fields_of(params, ReferenceParams)
        return ReferenceState(
            accept_policy(policy, policy_params, proposal.policy, count),
            accept_policy(reference, base_params, proposal.reference, count),
        )

    parallel = policy.log_prob is not None and reference.log_prob is not None
    vocab_size = policy.vocab_size or reference.vocab_size
    both = Policy(init, step, log_prob if parallel else None, check, vocab_size, policy.eos_ids)
    blocks = policy.verify is not None and reference.verify is not None
    return both._replace(verify=verify, accept=accept) if blocks else both

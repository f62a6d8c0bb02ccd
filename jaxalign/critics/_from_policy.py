"""The log-probability of any Policy as a critic."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import where_rows
from jaxalign._blocks import accept_policy, at, joined, verify_policy
from jaxalign._builders import cached
from jaxalign._parts import check_policy_argument, start_policy, step_policy
from jaxalign.critics._model_critics import chosen_token, gather
from jaxalign.shapes import Candidates, LogProbs, NextToken, Scores
from jaxalign.types import Array, Critic, Params, Policy, Prompts, State, StepOutput


class FromPolicyState(NamedTuple):
    """State and proposal of `from_policy`."""

    policy: State
    """That of the policy, before the pending token."""
    log_prob: LogProbs
    """[B,V], of the policy after the tokens that it has read."""
    pending: NextToken
    """[B], the token that was chosen last and that the policy has yet to read; -1 for none."""
    candidates: Candidates | None = None
    """In a proposal, the candidates [B,K] that were scored; None in a state, and for the whole vocabulary."""


@cached
def from_policy(policy: Policy) -> Critic:
    """The log-probability of any Policy as a critic: q(s,z) = log pi(z|s). Increment.

    params: the policy's. `genarm(lm)` is this with a language model; a tilt, a truncation or a table serves as well. A
    step costs a step of the policy, which is taken when the next token is scored. A token outside the policy's support
    has NEGATIVE, and is outside the support of what this critic tilts.

    Args:
      policy: over the vocabulary of the base.

    Returns:
      An increment Critic.

    Raises:
      ValueError: `policy` is no Policy.
    """
    check_policy_argument("policy", policy)

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        state, output = start_policy(policy, params, rng, prompts, max_new_tokens)
        return FromPolicyState(state, output.log_prob, jnp.full(output.log_norm.shape, -1, jnp.int32))

    def score(
        params: Params, rng: Array, state: FromPolicyState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        del output
        moves = state.pending >= 0

        def read() -> tuple[State, Array]:
            moved, after = step_policy(policy, params, rng, state.policy, state.pending)
            return moved, where_rows(moves, after.log_prob, state.log_prob)

        # `advance` has no key to step with. A state that is scored again has no token pending, and costs no step.
        inner, log_prob = jax.lax.cond(moves.any(), read, lambda: (state.policy, state.log_prob))
        proposal = FromPolicyState(inner, log_prob, jnp.full_like(state.pending, -1), candidates)
        return gather(log_prob, candidates), proposal

    def advance(params: Params, proposal: FromPolicyState, choice: Array) -> State:
        del params
        token = chosen_token(proposal.candidates, choice).astype(proposal.pending.dtype)
        return proposal._replace(pending=token, candidates=None)

    def verify(
        params: Params,
        rng: Array,
        state: FromPolicyState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        del outputs, choices
        # A proposal has no token pending: `score` has read it.
        found, inner = verify_policy(policy, params, rng, state.policy, tokens, mask)
        log_prob = joined(state.log_prob, found.log_prob)
        offered = None if candidates is None else joined(state.candidates, candidates)
        return gather(found.log_prob, candidates), FromPolicyState(inner, log_prob, state.pending, offered)

    def accept(params: Params, proposal: FromPolicyState, count: Array) -> State:
        inner = accept_policy(policy, params, proposal.policy, count)
        log_prob, candidates = at((proposal.log_prob, proposal.candidates), count)
        return FromPolicyState(inner, log_prob, proposal.pending, candidates)

    critic = Critic(init, score, advance, "increment", policy.check, policy.vocab_size)
    return critic if policy.verify is None else critic._replace(verify=verify, accept=accept)

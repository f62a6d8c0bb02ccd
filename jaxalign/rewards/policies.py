"""The log-probability of a whole response under any Policy as a Reward."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign import mdp
from jaxalign._arrays import at_least_float32
from jaxalign._builders import cached
from jaxalign._parts import check_policy_argument, start_policy, step_policy
from jaxalign.shapes import RewardValues, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.types import Array, CheckedReward, Params, Policy, Reward, State, TokenBatch


@cached
def from_policy(policy: Policy) -> Reward:
    """Builds the log-probability of the whole response, r(x,y) = log pi(y|x), differentiable in every leaf of params.

    params: the policy's. The implicit reward of DPO is `weighted_sum([from_policy(policy), from_policy(base)])` with
    weights (b, −b); pi(y)^a is the target at beta 1/(a − 1) of a decoder of pi that tilts by this reward.

    Args:
      policy: any Policy. One with a parallel log_prob reads the text in one pass; any other is stepped through it. One
        that draws is given the same key for every text.

    Returns:
      A Reward, in nats; NEGATIVE or below for a response that the policy cannot write.

    Raises:
      ValueError: `policy` is no Policy; when it is used, those of its check.
    """
    check_policy_argument("policy", policy)

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        part = mdp.response_part(mask, prompt_length)
        prompts = TokenBatch(tokens, mask & ~part, index)
        response, real = mdp.compact(tokens, part)
        if policy.log_prob is not None:
            scored = policy.log_prob(params, prompts, response, real)
            return at_least_float32(jnp.where(real, scored.log_prob, 0).sum(axis=1))
        rng, width = jax.random.key(0), tokens.shape[1]
        state, output = start_policy(policy, params, rng, prompts, width)

        def step(
            carry: tuple[State, Array, Array], at: tuple[Array, Array, Array]
        ) -> tuple[tuple[State, Array, Array], None]:
            state, log_prob, total = carry
            t, token, there = at
            value = jnp.take_along_axis(log_prob, token[:, None], axis=1)[:, 0]
            moved, output = step_policy(policy, params, jax.random.fold_in(rng, t), state, jnp.where(there, token, -1))
            return (moved, output.log_prob, total + jnp.where(there, value, 0)), None

        total = jnp.zeros(tokens.shape[:1], at_least_float32(output.log_prob).dtype)
        xs = jnp.arange(width), response.T, real.T
        (_, _, total), _ = jax.lax.scan(jax.checkpoint(step), (state, output.log_prob, total), xs)
        return total

    return CheckedReward(reward, policy.check, policy.vocab_size)

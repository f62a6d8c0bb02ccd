"""Scalars of a Policy that is stepped through given responses beside a critic of the leader's utility."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign import rollout, shaping
from jaxalign._arrays import is_supported
from jaxalign._parts import advance_critic, score_critic, start_critic, start_policy, step_policy
from jaxalign.types import Array, Critic, Params, Policy, Prompts, State, StepOutput, TokenBatch


def stepped(
    form: Literal["all_tokens", "togo"],
    policy: Policy,
    params: Params,
    values: Critic,
    value_params: Params,
    rng: Array,
    prompts: Prompts,
    texts: TokenBatch,
    tokens: Array,
    mask: Array,
    utility: Array,
) -> Array:
    """Gives `shaping.all_tokens` or `shaping.togo` of responses, whose tables of all tokens are never kept.

    Args:
      form: which of them.
      policy: the follower.
      params: its parameters, in which the result is differentiated.
      values: Q_u, the expected utility after each token.
      value_params: its parameters.
      rng: consumed, by parts that draw.
      prompts: the follower's [B,P].
      texts: the same as a TokenBatch, for the critic.
      tokens: [B,T], right-padded responses.
      mask: [B,T] bool.
      utility: [B].

    Returns:
      A scalar, the mean over responses.
    """
    steps = tokens.shape[1]
    start, beside, scoring, moves = jax.random.split(rng, 4)
    state, output = start_policy(policy, params, start, prompts, steps)
    critic = start_critic(values, value_params, beside, texts, steps)
    # The last token of a response is never fed: nothing is read after it.
    feed = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))

    def step(carry: tuple[State, StepOutput, State], xs: Any) -> tuple[tuple[State, StepOutput, State], Array]:
        state, output, critic = carry
        t, token, real, fed = xs
        q, proposal = score_critic(values, value_params, jax.random.fold_in(scoring, t), critic, output, None)
        q = jax.lax.stop_gradient(q)
        log_prob, chosen = rollout.token_value(output.log_prob, token), rollout.token_value(q, token)
        if form == "all_tokens":
            term = shaping.all_tokens(
                output.log_prob[:, None],
                q=q[:, None],
                log_prob=log_prob[:, None],
                chosen_q=chosen[:, None],
                utility=utility,
                mask=real[:, None],
            )
        else:
            inside = is_supported(output.log_prob)
            prob = jnp.where(inside, jnp.exp(jnp.where(inside, output.log_prob, 0)), 0)
            value = (prob * jnp.where(inside, q, 0)).sum(axis=-1)
            term = shaping.togo(log_prob[:, None], q=chosen[:, None], value=value[:, None], mask=real[:, None])
        token = jnp.where(fed, token, -1)
        state, output = step_policy(policy, params, jax.random.fold_in(moves, t), state, token)
        return (state, output, advance_critic(values, value_params, proposal, token, before=critic)), term

    xs = (jnp.arange(steps), tokens.T, mask.T, feed.T)
    _, terms = jax.lax.scan(jax.checkpoint(step), (state, output, critic), xs)
    found: Array = terms.sum()
    return found

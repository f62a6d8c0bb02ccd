"""How near draws were to other tokens: which of them rounding could have changed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import drop_weak_types
from jaxalign._parts import check_policy_argument, start_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding._given import open_responses
from jaxalign.decoding.requests import EosIds, streams, with_temperature
from jaxalign.prompts import prompt_index
from jaxalign.shapes import PerToken
from jaxalign.types import Array, ArrayLike, Params, Policy, Prompts


@tells_programs
def draw_margins(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    *,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
) -> PerToken:
    """Gives the margin of each draw of `sample`: how far the cumulative probabilities may move before another token is
    drawn.

    A disturbance of d nats moves them by at most about d, so that the share of tokens with a margin below d bounds the
    share that it changes. Drawing those in a wider type makes changes rare, not impossible.

    Args:
      policy, params, rng, prompts, eos_ids, temperature: those that `sample` drew with.
      tokens: [B,T] ids that it gave, one response per prompt.
      mask: [B,T] bool, True on their tokens.

    Returns:
      [B,T] in [0,1], |u − the nearest edge between two tokens|; 1 outside the mask.

    Raises:
      ValueError: responses that are refused by `log_prob`, a temperature that is by `sample`.
    """
    check_policy_argument("policy", policy)
    prompts, tokens, mask, ids = open_responses(policy, params, rng, prompts, tokens, mask, eos_ids)
    policy, params, prompts = with_temperature(policy, params, prompts, temperature)
    found: Array = _margins(policy, drop_weak_types(params), rng, prompts, tokens, mask, ids)
    return found


@functools.partial(jax.jit, static_argnums=(0, 6))
def _margins(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    eos_ids: tuple[int, ...],
) -> Array:
    start, draws = jax.random.split(rng)
    steps = tokens.shape[1]
    state, output = start_policy(policy, params, start, prompts, steps)
    rows = streams(prompt_index(prompts), jnp.zeros(1, jnp.int32))

    def measure(t: Array, frame: rollout.Frame, memory: Array) -> tuple[rollout.Frame, Array]:
        log_prob = frame.output.log_prob
        uniform = rollout.uniform_rows(jax.random.fold_in(draws, t), rows, log_prob.dtype)
        return frame, memory.at[:, t].set(rollout.draw_margin(log_prob, uniform))

    margins = rollout.rollout(
        policy,
        params,
        draws,
        state,
        output,
        steps=steps,
        eos_ids=eos_ids,
        rows=rows,
        limits=mask.sum(axis=1),
        last_step=False,
        hooks=rollout.Hooks(before_draw=measure, choose_token=lambda t, drawn: tokens[:, t].astype(drawn.dtype)),
        memory=jnp.ones(tokens.shape, output.log_prob.dtype),
    ).memory
    return jnp.where(mask, margins, 1)

"""Decoders that draw several responses and keep one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign import loop, mdp
from jaxalign.decoding.sampling import check_request, with_temperature
from jaxalign.types import (
    Array,
    ArrayLike,
    Completions,
    Params,
    Policy,
    Prompts,
    Reward,
    Selection,
    TokenBatch,
    at_least_float32,
    prompt_index,
    prompts_for,
    repeat_rows,
    strong,
)


def best_of_n(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    n: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: ArrayLike = 1.0,
) -> Selection:
    """n independent responses per prompt, and the one of highest reward (the first among equals).

    The prompt is encoded once and the state repeated. params {"policy", "reward"}; the other arguments as `sample`.
    Sample j of a prompt depends on rng, the prompt's index and j alone. KL(best‖policy) <= log n − (n−1)/n.
    ValueError: n < 1, and those of `sample`.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 sample, found {n}")
    inner = prompts_for(prompts, "policy")
    eos_ids = check_request(policy, params["policy"], inner, max_new_tokens, eos_ids)
    tempered, policy_params, inner = with_temperature(policy, params["policy"], inner, temperature)
    arrays = {"policy": policy_params, "reward": params["reward"]}
    both = {"policy": inner, "reward": prompts_for(prompts, "reward")}
    return _best_of_n(tempered, reward, strong(arrays), rng, both, n, max_new_tokens, eos_ids)


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7))
def _best_of_n(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    n: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> Selection:
    start, draws = jax.random.split(rng)
    index = prompt_index(prompts)
    state, output = policy.init(params["policy"], start, prompts["policy"], max_new_tokens)
    state, output = repeat_rows((state, output), n)
    rows = (index[:, None] * n + jnp.arange(n)).reshape(-1)
    _, _, drawn = loop.rollout(
        policy,
        params["policy"],
        draws,
        state,
        output,
        steps=max_new_tokens,
        eos_ids=eos_ids,
        rows=rows,
        last_step=False,
    )
    judged = repeat_rows(prompts["reward"]._replace(index=index), n)
    score = score_completions(reward, params["reward"], judged, drawn).reshape(-1, n)
    samples: Completions = jax.tree.map(lambda x: x.reshape((-1, n, *x.shape[1:])), drawn)
    pick = jnp.argmax(score, axis=1)
    best: Completions = jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), pick], samples)
    return Selection(best, samples, score)


def join(prompts: TokenBatch, completions: Completions) -> tuple[Array, Array, Array]:
    """(tokens [B,P+T], mask [B,P+T], prompt_length [B]) of prompts and their responses: what a Reward takes."""
    return mdp.concatenate(prompts, completions.tokens, completions.mask)


def score_completions(reward: Reward, params: Params, prompts: Prompts, completions: Completions) -> Array:
    """reward [N] of completions [N,T] after prompts [N,P], at least float32."""
    return at_least_float32(reward(params, *join(prompts, completions), prompt_index(prompts)))

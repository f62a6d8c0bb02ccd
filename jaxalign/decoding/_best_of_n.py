"""Decoders that draw several responses and keep one."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, rollout
from jaxalign._arrays import at_least_float32, drop_weak_types, per_row, repeat_rows
from jaxalign._checks import check_positive, entry, is_concrete, same_prompts
from jaxalign.decoding._sampling import check_request, streams, with_temperature
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts, Reward, Selection, TokenBatch


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
    chunk: int | None = None,
    allow_nan: bool = False,
) -> Selection:
    """n independent responses per prompt, and the one of highest reward (the first among equals).

    The prompt is encoded once and the state repeated. params {"policy", "reward"}; the other arguments as `sample`.
    Sample j of a prompt depends on rng, the prompt's index and j alone: the first m of n are those of a call with m,
    and sample 0 is what `sample` draws. KL(best‖policy) <= log n − (n−1)/n.

    chunk: samples per prompt that are decoded and scored at a time, a divisor of n; all when None. It bounds memory
    (B·chunk caches) and changes no sample. allow_nan: a reward that is NaN is no error; look at every one.

    ValueError: n < 1, a chunk that does not divide n, a reward over another vocabulary or prompts that do not fit its
    model, a reward that is NaN, and those of `sample`.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 sample, found {n}")
    chunk = n if chunk is None else chunk
    if chunk < 1 or n % chunk:
        raise ValueError(f"chunk: expected a divisor of n = {n}, found {chunk}")
    asked = open_request(policy, reward, params, prompts, max_new_tokens, eos_ids, temperature)
    selection = _best_of_n(
        asked.policy, reward, asked.params, rng, asked.prompts, n, max_new_tokens, asked.eos_ids, chunk
    )
    if not allow_nan:
        check_scores(selection.reward)
    return selection


class Request(NamedTuple):
    """What a decoder that draws from a policy and judges by a reward works on, checked. policy: under its temperature;
    params {"policy", "reward", …}, prompts {"policy", "reward"}."""

    policy: Policy
    params: dict[str, Any]
    prompts: dict[str, Any]
    eos_ids: tuple[int, ...]


def open_request(
    policy: Policy,
    reward: Reward,
    params: Params,
    prompts: Prompts,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: ArrayLike = 1.0,
    *,
    per_prompt: tuple[str, ...] = (),
) -> Request:
    """The host checks before tracing. per_prompt: entries of params, scalars or [B], that become [B]; a "beta" must be
    > 0. ValueErrors."""
    prompts = same_prompts(prompts)
    inner, judged = prompts_for(prompts, "policy"), prompts_for(prompts, "reward")
    own, reward_params = entry(params, "policy"), entry(params, "reward")
    if "beta" in per_prompt:
        check_positive("beta", entry(params, "beta"))
    inner, eos_ids = check_request(policy, own, inner, max_new_tokens, eos_ids)
    check_reward(reward, reward_params, judged, max_new_tokens, policy.vocab_size)
    tempered, policy_params, inner = with_temperature(policy, own, inner, temperature)
    batch = prompt_index(judged).shape[0]
    arrays = {"policy": policy_params, "reward": reward_params}
    arrays |= {name: per_row(entry(params, name), batch, name=name) for name in per_prompt}
    return Request(tempered, drop_weak_types(arrays), {"policy": inner, "reward": judged}, eos_ids)


def check_reward(
    reward: Reward, params: Params, prompts: TokenBatch, max_new_tokens: int, vocab_size: int | None
) -> None:
    """The host checks of a Reward for prompts [B] and responses over vocab_size tokens. ValueErrors."""
    if not isinstance(prompts, TokenBatch):
        raise ValueError(f"prompts['reward']: expected one TokenBatch, found {type(prompts).__name__}")
    found = getattr(reward, "vocab_size", None)
    if None not in (found, vocab_size) and found != vocab_size:
        raise ValueError(
            f"reward: expected the policy's vocabulary of {vocab_size} tokens, found {found} (models.match_vocabulary "
            "cuts appended rows; rewards.from_text decodes and re-encodes)"
        )
    check = getattr(reward, "check", None)
    if check is not None:
        check(params, prompts, max_new_tokens)


def check_scores(scores: Array) -> None:
    """ValueError on the host where a reward is NaN: it would be chosen as the best, or never. −inf forbids a response
    and is allowed."""
    if is_concrete(scores) and bool(jnp.isnan(scores).any()):
        rows = np.flatnonzero(np.isnan(np.asarray(scores)).any(axis=-1)).tolist()
        raise ValueError(f"reward: expected numbers, found NaN for prompts {rows}")


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8))
def _best_of_n(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    n: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    chunk: int,
) -> Selection:
    start, draws = jax.random.split(rng)
    index = prompt_index(prompts)
    state, output = policy.init(params["policy"], start, prompts["policy"], max_new_tokens)
    state, output = repeat_rows((state, output), chunk)
    judged = repeat_rows(prompts["reward"], chunk)

    def draw(sample: Array) -> tuple[Completions, Array]:
        """Completions [B,chunk,T] and rewards [B,chunk] of the samples numbered `sample` [chunk]."""
        _, _, drawn = rollout.rollout(
            policy,
            params["policy"],
            draws,
            state,
            output,
            steps=max_new_tokens,
            eos_ids=eos_ids,
            rows=streams(index, sample),
            last_step=False,
        )
        score = score_completions(reward, params["reward"], judged, drawn)
        return jax.tree.map(lambda x: x.reshape((-1, chunk, *x.shape[1:])), (drawn, score))

    if chunk == n:
        samples, score = draw(jnp.arange(n, dtype=jnp.int32))
    else:
        parts = jax.lax.map(draw, jnp.arange(n, dtype=jnp.int32).reshape(-1, chunk))
        # [n/chunk, B, chunk, ...] -> [B, n, ...]
        samples, score = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape((x.shape[1], n, *x.shape[3:])), parts)
    pick = jnp.argmax(score, axis=1)
    best: Completions = jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), pick], samples)
    return Selection(best, samples, score)


def join(prompts: TokenBatch, completions: Completions) -> tuple[Array, Array, Array]:
    """(tokens [B,P+T], mask [B,P+T], prompt_length [B]) of prompts and their responses: what a Reward takes."""
    return mdp.concatenate(prompts, completions.tokens, completions.mask)


def score_completions(reward: Reward, params: Params, prompts: Prompts, completions: Completions) -> Array:
    """reward [N] of completions [N,T] after prompts [N,P], at least float32."""
    return at_least_float32(reward(params, *join(prompts, completions), prompt_index(prompts)))

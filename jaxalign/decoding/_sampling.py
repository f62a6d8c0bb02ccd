"""Ancestral sampling from any Policy, and the log-probability of given responses under it."""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import policies, rollout
from jaxalign._arrays import NEGATIVE, drop_weak_types, is_supported
from jaxalign._checks import is_concrete, same_prompts
from jaxalign.prompts import any_prompts, prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts, State, StepOutput


def sample(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: ArrayLike = 1.0,
) -> Completions:
    """Draws one response per prompt, y_t ~ pi(·|x,y_<t) at `temperature`.

    Args:
      policy: built once and reused; it is static under jit.
      params: its parameters.
      rng: consumed. A prompt's response depends on rng and its index alone, not on the prompts beside it.
      prompts: a TokenBatch [B,P] (left-padded by convention, either padding works), or a dict that mirrors params.
      max_new_tokens: T >= 1, the limit of a response, its EOS included.
      eos_ids: the ids that end a response.
      temperature: scalar or [B], >= 0; the outermost transform, 0 is greedy. An array: values do not retrace (the
        Python number 1.0 leaves the transform out, which is one trace of its own).

    Returns:
      Completions [B,T] of the distribution drawn from.

    Raises:
      ValueError: on the host, before tracing: no new tokens, an empty prompt, a token outside the vocabulary, a prompt
        that does not fit the context, a beta <= 0, …
    """
    prompts, eos_ids = check_request(policy, params, prompts, max_new_tokens, eos_ids)
    policy, params, prompts = with_temperature(policy, params, prompts, temperature)
    return _sample(policy, drop_weak_types(params), rng, prompts, max_new_tokens, eos_ids)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _sample(
    policy: Policy, params: Params, rng: Array, prompts: Prompts, max_new_tokens: int, eos_ids: tuple[int, ...]
) -> Completions:
    start, draws = jax.random.split(rng)
    state, output = policy.init(params, start, prompts, max_new_tokens)
    return rollout.rollout(
        policy,
        params,
        draws,
        state,
        output,
        steps=max_new_tokens,
        eos_ids=eos_ids,
        rows=streams(prompt_index(prompts), jnp.zeros(1, jnp.int32)),
        last_step=False,
    )[2]


def streams(index: Array, sample: Array) -> Array:
    """The random streams [B·n,2] of samples `sample` [n] of the prompts `index` [B]: what `rollout.rollout` takes as
    rows."""
    pairs = jnp.broadcast_arrays(index[:, None], sample[None, :])
    return jnp.stack([pair.reshape(-1) for pair in pairs], axis=1)


def with_temperature(
    policy: Policy, params: Params, prompts: Prompts, temperature: ArrayLike
) -> tuple[Policy, Params, Prompts]:
    """The policy under `policies.temperature`; unchanged for the Python number 1."""
    if isinstance(temperature, int | float) and temperature == 1:
        return policy, params, prompts
    if is_concrete(temperature) and not np.all(np.asarray(temperature) >= 0):
        raise ValueError(f"temperature: expected a value >= 0, found {np.asarray(temperature)}")
    params = {"policy": params, "temperature": jnp.asarray(temperature, jnp.result_type(float))}
    if isinstance(prompts, dict):
        prompts = {"policy": prompts}
    return _tempered(policy), params, prompts


@functools.lru_cache(maxsize=64)
def _tempered(policy: Policy) -> Policy:
    """One wrapped Policy per Policy: a new closure would be a new trace (law 6)."""
    return policies.temperature(policy)


def check_request(
    policy: Policy, params: Params, prompts: Prompts, max_new_tokens: int, eos_ids: tuple[int, ...]
) -> tuple[Prompts, tuple[int, ...]]:
    """What every decoder checks on the host before tracing; gives the prompts with one index in every entry, and
    eos_ids as a tuple of ints."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    eos_ids = tuple(int(i) for i in eos_ids)
    vocab = policy.vocab_size
    if any(i < 0 or (vocab is not None and i >= vocab) for i in eos_ids):
        raise ValueError(f"eos_ids: expected ids in [0, {vocab}), found {eos_ids}")
    prompts = same_prompts(prompts)
    if policy.check is not None:
        policy.check(params, prompts, max_new_tokens)
    return prompts, eos_ids


def log_prob(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    *,
    eos_ids: tuple[int, ...] = (),
) -> Completions:
    """log pi(y_t|x,y_<t) of given responses under ANY policy, differentiable in every leaf of params.

    A policy with a parallel form (a plain language model) uses it. Any other is stepped token by token: two nested
    scans, rematerialised, so that memory grows with the square root of T times one state.

    Args:
      rng: consumed, by policies that draw.
      tokens [B,T] int32, mask [B,T] bool: right-padded responses (a ValueError on the host otherwise), EOS included.
      eos_ids: only tells `finished` from `truncated`.

    Returns:
      Completions. A response with a token of probability zero has in_support False: that token's log_prob is
      NEGATIVE (no gradient), and every entry after it is 0, since no policy is defined there.
    """
    chex.assert_rank([tokens, mask], 2)
    chex.assert_equal_shape([tokens, mask])
    prompts, eos_ids = check_request(policy, params, prompts, tokens.shape[1], eos_ids)
    if tokens.shape[0] != any_prompts(prompts).tokens.shape[0]:
        raise ValueError(
            f"tokens: expected one response per prompt, {any_prompts(prompts).tokens.shape[0]}, found {tokens.shape[0]}"
        )
    if is_concrete(tokens, mask) and policy.vocab_size is not None:
        real = np.asarray(tokens)[np.asarray(mask, bool)]
        if real.size and (real.min() < 0 or real.max() >= policy.vocab_size):
            raise ValueError(
                f"tokens: expected ids in [0, {policy.vocab_size}), found ids from {real.min()} to {real.max()}"
            )
    if is_concrete(mask):
        host = np.asarray(mask, bool)
        holes = np.flatnonzero((host[:, 1:] & ~host[:, :-1]).any(axis=1))
        if holes.size:
            raise ValueError(f"mask: expected right-padded responses, found real tokens after padding in rows {holes}")
    mask = mask.astype(bool)
    completions = _log_prob(policy, drop_weak_types(params), rng, prompts, tokens, mask)
    finished = (mask & rollout.is_eos(tokens, eos_ids)).any(axis=1)
    return completions._replace(finished=finished, truncated=~finished)


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
    if policy.log_prob is None:
        return _stepwise(policy, params, rng, prompts, tokens, mask)
    completions = policy.log_prob(params, prompts, tokens, mask)
    return completions._replace(in_support=jnp.ones(tokens.shape[:1], bool))


def _stepwise(policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
    batch, steps = tokens.shape
    start, moves = jax.random.split(rng)
    state, output = policy.init(params, start, prompts, steps)
    # The last token of a row is scored but never fed: nothing is read after it.
    feed = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))

    def step(carry: tuple[State, StepOutput, Array], xs: Any) -> tuple[tuple[State, StepOutput, Array], Any]:
        state, output, supported = carry
        t, token, real, fed = xs
        real = real & supported
        value = rollout.token_value(output.log_prob, token)
        inside = is_supported(value)
        ref = rollout.token_value(output.log_prob_ref, token)
        kl = rollout.exact_kl(output.log_prob, output.log_prob_ref)
        record = {
            "log_prob": jnp.where(real, jnp.where(inside, value, NEGATIVE), 0),
            "log_prob_ref": jnp.where(real, ref, 0),
            "log_norm": jnp.where(real, output.log_norm, 0),
            "kl": jnp.where(real, kl, 0),
        }
        supported = supported & (inside | ~real)
        token = jnp.where(fed & supported, token, -1)
        state, output = policy.step(params, jax.random.fold_in(moves, t), state, token)
        return (state, output, supported), record

    segment = math.isqrt(steps - 1) + 1
    padding = -steps % segment

    def segments(x: Array) -> Array:
        """[T,...] -> [T/segment, segment, ...], zeros (False: standing rows) at the end."""
        x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape((-1, segment, *x.shape[1:]))

    xs = jax.tree.map(segments, (jnp.arange(steps), tokens.T, mask.T, feed.T))
    inner = jax.checkpoint(lambda carry, part: jax.lax.scan(jax.checkpoint(step), carry, part))
    carry, records = jax.lax.scan(inner, (state, output, jnp.ones(batch, bool)), xs)
    fields = jax.tree.map(lambda x: x.reshape((-1, batch))[:steps].T, records)
    rows = jnp.zeros(batch, bool)
    return Completions(tokens, mask, **fields, finished=rows, truncated=~rows, in_support=carry[2])

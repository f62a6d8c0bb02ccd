"""Ancestral sampling from any Policy, and the log-probability of given responses under it."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import NEGATIVE, drop_weak_types, is_supported, repeat_rows
from jaxalign._checks import is_concrete
from jaxalign._parts import check_policy_argument, start_policy, step_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import _chunks
from jaxalign.decoding._given import open_responses
from jaxalign.decoding.requests import (
    Decode,
    EosIds,
    Tokenizer,
    check_request,
    count,
    open_prompts,
    streams,
    with_temperature,
)
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts, State, StepOutput


@tells_programs
def sample(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    num_samples: int | None = None,
    tokenizer: Tokenizer | Decode | None = None,
    deterministic: int | None = None,
) -> Completions:
    """Draws one response per prompt, or several, y_t ~ pi(·|x,y_<t) at `temperature`.

    Args:
      policy: built once and reused; it is static under jit.
      params: its parameters.
      rng: consumed. At one batch size and width a prompt's response depends on rng and its index alone. Another batch
        size or width is another program, whose last bits differ, and in bfloat16 some tokens with them.
      prompts: a TokenBatch [B,P] (left-padded by convention, either padding works), a dict that mirrors params, or with
        `tokenizer` a list of strings, which go into a `prompts.prompt_batch`.
      max_new_tokens: T >= 1, the limit of a response, its EOS included.
      eos_ids: the ids that end a response, one or several; () for none; None for the policy's own.
      temperature: scalar or [B], >= 0; the outermost transform, 0 is greedy. It is the one number that may differ per
        prompt and is no entry of params: it is put on the policy from outside, so that the policy's own params serve
        every decoder at every temperature, and the Python number 1.0 leaves the transform out (a trace of its own).
        Arrays do not retrace.
      num_samples: n >= 1 responses per prompt, which share its encoded state: sample j is that of `best_of_n`. None:
        one response, without an axis for it.
      tokenizer: needed for prompts that are strings.
      deterministic: G >= 1: all draws run in chunks of G rows (prompts, or their samples), each prompt at the bucket of
        its own length. The tokens then depend on rng, the prompt, its index, the sample's number, max_new_tokens and G
        alone: they are the same at any batch size, under either padding and beside any other prompts, in float32 and
        bfloat16, on one device, jax version and dtype. It costs nothing where the batch is a multiple of G and the
        device is kept busy by G rows, and reads the weights once for each chunk. None: the whole batch at once.

    Returns:
      Completions [B,T], or [B,n,T], of the distribution drawn from. `sum_of_steps` gives its KL.

    Raises:
      ValueError: on the host, before tracing: counts below 1, an empty prompt, a token outside the vocabulary, a prompt
        that does not fit the context, a beta <= 0, no EOS known.
    """
    n = None if num_samples is None else count("num_samples", num_samples)
    prompts = open_prompts(prompts, tokenizer)
    prompts, max_new_tokens, ids = check_request(policy, params, rng, prompts, max_new_tokens, eos_ids)
    policy, params, prompts = with_temperature(policy, params, prompts, temperature)
    if deterministic is not None:
        size = count("deterministic", deterministic)
        found = _chunks.draw(policy, drop_weak_types(params), rng, prompts, max_new_tokens, ids, n or 1, size)
        return found if n is None else _by_prompt(found, n)
    drawn: Completions = _sample(policy, drop_weak_types(params), rng, prompts, max_new_tokens, ids, n)
    return drawn


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _sample(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    n: int | None = None,
) -> Completions:
    """[B,T] where n is None, else [B,n,T]."""
    start, draws = jax.random.split(rng)
    state, output = start_policy(policy, params, start, prompts, max_new_tokens)
    if n is not None:
        state, output = repeat_rows((state, output), n)
    drawn = rollout.rollout(
        policy,
        params,
        draws,
        state,
        output,
        steps=max_new_tokens,
        eos_ids=eos_ids,
        rows=streams(prompt_index(prompts), jnp.arange(n or 1, dtype=jnp.int32)),
        last_step=False,
    ).completions
    return drawn if n is None else _by_prompt(drawn, n)


def _by_prompt(drawn: Completions, n: int) -> Completions:
    """[B·n,...] -> [B,n,...]."""
    found: Completions = jax.tree.map(lambda x: x.reshape((-1, n, *x.shape[1:])), drawn)
    return found


@tells_programs
def log_prob(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    *,
    eos_ids: EosIds = None,
    deterministic: int | None = None,
    exact: bool = False,
) -> Completions:
    """Scores given responses, log pi(y_t|x,y_<t) under ANY policy, differentiable in every leaf of params.

    A policy with a parallel form (a plain language model) uses it. Any other is stepped token by token: two nested
    scans, rematerialised, so that memory grows with the square root of T times one state.

    Args:
      policy, params, prompts: as `sample`.
      rng: consumed, by policies that draw.
      tokens: [B,T] ids of the responses, their EOS included.
      mask: [B,T] bool, True on real tokens; responses are right-padded.
      eos_ids: tells `finished` from `truncated` and nothing else; None for the policy's own, and none where it names
        none.
      deterministic: G >= 1: rows are scored in chunks of G, each prompt at the bucket of its own length, so that the
        bits of log_prob are the same at any batch size and under either padding, for one G, T, device, jax version and
        dtype. They are not the sampler's bits: per token, float32 is within 1e-5 nats of it and bfloat16 within 0.05.
        None: the whole batch at once.
      exact: with `deterministic`, score by the sampler's own program, one token after the other: responses that
        `sample` drew with the same rng, G, eos_ids and max_new_tokens = T get the very bits that it gave. For audits:
        T steps in place of one pass, and no derivative.

    Returns:
      Completions. A response with a token of probability zero has in_support False: that token's log_prob is
      NEGATIVE (no gradient), and every entry after it is 0, since no policy is defined there.

    Raises:
      ValueError: tokens and mask of other shapes or types, a mask with holes, ids outside the vocabulary, exact without
        deterministic or with tokens after an EOS, and those of `sample`.
    """
    check_policy_argument("policy", policy)
    if eos_ids is None and policy.eos_ids is None:
        eos_ids = ()
    prompts, tokens, mask, ids = open_responses(policy, params, rng, prompts, tokens, mask, eos_ids)
    params = drop_weak_types(params)
    completions: Completions
    if exact:
        completions = _replayed(policy, params, rng, prompts, tokens, mask, ids, deterministic)
    elif deterministic is not None:
        completions = _log_prob_in_chunks(policy, params, rng, prompts, tokens, mask, deterministic)
    else:
        completions = _log_prob(policy, params, rng, prompts, tokens, mask)
    finished = (mask & rollout.is_eos(tokens, ids)).any(axis=1)
    return completions._replace(finished=finished, truncated=~finished)


def _log_prob_in_chunks(
    policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array, size: int
) -> Completions:
    slices = _chunks.per_prompt(policy, params, prompts, tokens.shape[1])
    parts = list(itertools.chain(*_chunks.chunks(prompts, size)))
    found: list[Completions] = [
        _log_prob(
            policy, _chunks.at_rows(params, slices, part.rows), rng, part.prompts, tokens[part.rows], mask[part.rows]
        )
        for part in parts
    ]
    return _chunks.in_order(found, [part.rows[: part.size] for part in parts])


def _replayed(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
    eos_ids: tuple[int, ...],
    size: int | None,
) -> Completions:
    """Scores by the steps of `_chunks.draw`, which take the given tokens."""
    if size is None:
        raise ValueError("exact: expected with deterministic=G, the chunk that the responses were drawn in, found none")
    if not is_concrete(tokens, mask):
        raise ValueError("exact: expected tokens and a mask that are known on the host, found traced ones")
    if bool((mask[:, 1:] & rollout.is_eos(tokens[:, :-1], eos_ids) & mask[:, :-1]).any()):
        raise ValueError(f"exact: expected responses that end at their first EOS {eos_ids}, found tokens after one")
    given = _chunks.Given(jnp.where(mask, tokens, -1).astype(jnp.int32), mask.sum(axis=1).astype(jnp.int32))
    found = _chunks.draw(policy, params, rng, prompts, tokens.shape[1], eos_ids, 1, count("deterministic", size), given)
    inside = is_supported(found.log_prob) | ~mask
    # No policy is defined after a token of probability zero.
    before = jnp.cumprod(jnp.pad(inside, ((0, 0), (1, 0)), constant_values=True)[:, :-1], axis=1).astype(bool)
    fields = {
        name: jnp.where(before & mask, getattr(found, name), 0) for name in ("log_prob", "log_prob_ref", "log_norm")
    }
    kl = None if found.kl is None else jnp.where(before & mask, found.kl, 0)
    rows = inside.all(axis=1)
    return Completions(tokens, mask, **fields, kl=kl, finished=rows, truncated=~rows, in_support=rows)


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
    if policy.log_prob is None:
        return _stepwise(policy, params, rng, prompts, tokens, mask)
    completions = policy.log_prob(params, prompts, tokens, mask)
    return completions._replace(in_support=jnp.ones(tokens.shape[:1], bool))


def _stepwise(policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
    batch, steps = tokens.shape
    start, moves = jax.random.split(rng)
    state, output = start_policy(policy, params, start, prompts, steps)
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
        state, output = step_policy(policy, params, jax.random.fold_in(moves, t), state, token)
        return (state, output, supported), record

    segment = math.isqrt(steps - 1) + 1
    padding = -steps % segment

    def segments(x: Array) -> Array:
        """[T,...] -> [T/segment, segment, ...], zeros (False: frozen rows) at the end."""
        x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape((-1, segment, *x.shape[1:]))

    xs = jax.tree.map(segments, (jnp.arange(steps), tokens.T, mask.T, feed.T))
    inner = jax.checkpoint(lambda carry, part: jax.lax.scan(jax.checkpoint(step), carry, part))
    carry, records = jax.lax.scan(inner, (state, output, jnp.ones(batch, bool)), xs)
    fields = jax.tree.map(lambda x: x.reshape((-1, batch))[:steps].T, records)
    rows = jnp.zeros(batch, bool)
    return Completions(tokens, mask, **fields, finished=rows, truncated=~rows, in_support=carry[2])

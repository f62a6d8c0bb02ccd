"""Ancestral sampling from any Policy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import drop_weak_types, repeat_rows
from jaxalign._parts import start_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import _chunks
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
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts


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

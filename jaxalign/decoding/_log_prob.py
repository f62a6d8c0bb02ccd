"""The log-probability of given responses under any Policy: in parallel, by blocks of tokens, or step by step."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import NEGATIVE, drop_weak_types, is_supported
from jaxalign._blocks import Walk, accept_policy, at, joined, verify_policy
from jaxalign._checks import is_concrete
from jaxalign._parts import check_policy_argument, start_policy, step_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import _chunks
from jaxalign.decoding._given import open_responses
from jaxalign.decoding.requests import EosIds, count
from jaxalign.types import Array, Completions, Params, Policy, Prompts, State, StepOutput

LONGEST_BLOCK = 128
"""Most tokens of each row that are read in one pass."""

LARGEST_OUTPUT = 2**22
"""Most numbers of one distribution after each token of a block, B·S·V."""


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

    A policy with a parallel form (a plain language model) uses it. One whose parts can all `verify` several tokens in
    one pass (tilts, mixtures, truncations of language models) reads blocks of up to 128 tokens, fewer where the
    distributions over the vocabulary in a block would have more than 2^22 numbers (under jax.vmap, each block's). Any
    other is stepped token by token. Blocks or steps are two nested scans, rematerialised, so that memory grows with the
    square root of their number times one state.

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
    return _up_to_zero(found._replace(tokens=tokens, mask=mask))


def _up_to_zero(found: Completions) -> Completions:
    """NEGATIVE in place of any other logarithm of zero, and zeros after a token of probability zero, where no policy is
    defined."""
    mask = found.mask
    inside = is_supported(found.log_prob) | ~mask
    reached = mask & jnp.cumprod(jnp.pad(inside, ((0, 0), (1, 0)), constant_values=True)[:, :-1], axis=1).astype(bool)
    fields = {name: getattr(found, name) for name in ("log_prob", "log_prob_ref", "log_norm")}
    for name in ("log_prob", "log_prob_ref"):
        fields[name] = jnp.where(is_supported(fields[name]), fields[name], NEGATIVE)
    kl = None if found.kl is None else jnp.where(reached, found.kl, 0)
    fields = {name: jnp.where(reached, value, 0) for name, value in fields.items()}
    return found._replace(**fields, kl=kl, in_support=inside.all(axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
    if policy.log_prob is None:
        found = _by_blocks(policy, params, rng, prompts, tokens, mask)
    else:
        found = policy.log_prob(params, prompts, tokens, mask)._replace(tokens=tokens, mask=mask)
    return _up_to_zero(found)


def block_length(policy: Policy, batch: int, vocab_size: int, steps: int) -> int:
    """Gives how many tokens of each row are read in one pass.

    Args:
      policy: one without `verify` is stepped.
      batch: B.
      vocab_size: V of its outputs.
      steps: T.

    Returns:
      At least 1; blocks are of equal length as far as T allows.
    """
    if policy.verify is None:
        return 1
    longest = max(min(LONGEST_BLOCK, LARGEST_OUTPUT // (batch * vocab_size)), 1)
    return -(-steps // -(-steps // longest))


def _by_blocks(policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array) -> Completions:
    """Entries after a token of probability zero, and outside the mask, are undefined."""
    batch, steps = tokens.shape
    start, moves = jax.random.split(rng)
    state, output = start_policy(policy, params, start, prompts, steps)
    # The last token of a row is scored but never fed: nothing is read after it.
    feed = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    size = block_length(policy, batch, output.log_prob.shape[-1], steps)
    if size > 1 and _has_steps(policy, params, moves, state, tokens[:, :size], feed[:, :size]):
        size = 1  # a block would keep the states on its way, and a gradient what each of its steps leaves

    def block(carry: tuple[State, StepOutput, Array], xs: Any) -> tuple[tuple[State, StepOutput, Array], Any]:
        state, output, supported = carry
        number, token, real, fed = xs  # leaves [B,S]
        key = jax.random.fold_in(moves, number)
        before = jax.tree.map(lambda x: x[:, None], output)  # [B,S,...], of each token
        after, proposal = before, state  # [B,S+1,...] in blocks
        if size > 1:
            outputs, proposal = verify_policy(policy, params, key, state, token, fed & supported[:, None])
            after = jax.tree.map(joined, output, outputs)
            before = jax.tree.map(lambda x: x[:, :-1], after)
        record = {
            "log_prob": rollout.token_value(before.log_prob, token),
            "log_prob_ref": rollout.token_value(before.log_prob_ref, token),
            "log_norm": before.log_norm,
            "kl": rollout.exact_kl(before.log_prob, before.log_prob_ref),
        }
        # No policy is defined after a token of probability zero.
        inside = is_supported(record["log_prob"]) | ~real
        reached = supported[:, None] & jnp.cumprod(inside, axis=1).astype(bool)
        supported = reached[:, -1]
        taken = (fed & reached).sum(axis=1)
        if size > 1:
            state = accept_policy(policy, params, proposal, taken)
            output = at(after, taken)
        else:
            state, output = step_policy(policy, params, key, state, jnp.where(taken > 0, token[:, 0], -1))
        return (state, output, supported), {name: x.T for name, x in record.items()}

    blocks = -(-steps // size)
    segment = math.isqrt(blocks - 1) + 1

    def segments(x: Array, *, length: int) -> Array:
        """[N·length,...] -> [N/segment, segment, length, ...], zeros (False: frozen rows) at the end."""
        x = jnp.pad(x, ((0, -x.shape[0] % (segment * length)),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape((-1, segment, length, *x.shape[1:]))

    each = (jnp.moveaxis(segments(x.T, length=size), 2, 3) for x in (tokens, mask, feed))
    xs = (segments(jnp.arange(blocks), length=1)[..., 0], *each)
    inner = jax.checkpoint(lambda carry, part: jax.lax.scan(jax.checkpoint(block), carry, part))
    _, records = jax.lax.scan(inner, (state, output, jnp.ones(batch, bool)), xs)
    fields = jax.tree.map(lambda x: x.reshape((-1, batch))[:steps].T, records)
    rows = jnp.zeros(batch, bool)
    return Completions(tokens, mask, **fields, finished=rows, truncated=~rows, in_support=~rows)


def _has_steps(policy: Policy, params: Params, rng: Array, state: State, tokens: Array, mask: Array) -> bool:
    """Whether a part of a policy is stepped where the whole verifies a block."""
    proposal = jax.eval_shape(lambda *given: verify_policy(policy, *given)[1], params, rng, state, tokens, mask)
    parts = jax.tree.leaves(proposal, is_leaf=lambda part: isinstance(part, Walk))
    return any(isinstance(part, Walk) for part in parts)

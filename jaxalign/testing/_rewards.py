"""The laws of a Reward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp
from jaxalign._arrays import take_rows
from jaxalign._parts import check_reward_argument
from jaxalign._programs import tells_programs
from jaxalign.prompts import prompt_index
from jaxalign.rewards.values import host_values
from jaxalign.testing import _laws
from jaxalign.testing._laws import assert_same, broken, errors_break
from jaxalign.types import Array, Params, PrefixReward, Reward, TokenBatch


@tells_programs
def check_reward(
    reward: Reward,
    params: Params,
    prompts: TokenBatch,
    *,
    vocab_size: int,
    rng: Array | None = None,
    max_new_tokens: int = 4,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> None:
    """Checks that a Reward keeps laws 7, 8 and 13-17 of `jaxalign.testing` on random responses to some prompts.

    Args:
      reward: the reward; with a `prefix` (CheckedReward), that form is held to its laws 1 and 2 too.
      params: its parameters.
      prompts: at least two, of different lengths; five or more find more. Their index is the texts'.
      vocab_size: V, of the random responses.
      rng: what draws the responses; key 0 when None.
      max_new_tokens: T >= 2, of the longest response.
      rtol, atol: tolerances of all comparisons; loosen them for 16-bit parameters.

    Raises:
      AssertionError: a law does not hold; the message gives its number and name, and what was seen in which row.
      ValueError: arguments that are none: fewer than two prompts, fewer than two tokens, no function.
    """
    check_reward_argument("reward", reward)
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens: expected at least 2, found {max_new_tokens}")
    prompts = _laws.opened(prompts)
    size, index = prompts.tokens.shape[0], prompt_index(prompts)
    key = _laws.opened_rng(rng)
    responses = jax.random.randint(key, (size, max_new_tokens), 0, vocab_size, jnp.int32)
    # Rows of each length, from T down to 1.
    real = jnp.arange(max_new_tokens) < max_new_tokens - jnp.arange(size)[:, None] % max_new_tokens
    tokens, mask, length = mdp.concatenate(prompts, responses, real)
    _laws.assert_hashable("reward", reward)

    @jax.jit
    def values(params: Params, tokens: Array, mask: Array, length: Array, index: Array) -> Array:
        found: Array = host_values(reward(params, tokens, mask, length, index), length.shape, function=reward)
        return found

    def same(law: int, when: str, found: object, expected: object, rows: list[int] | None = None) -> None:
        assert_same(law, when, found, expected, rtol=rtol, atol=atol, rows=rows, whole="the reward")

    with errors_break(14, "the reward of texts [N,L]"):
        expected = values(params, tokens, mask, length, index)
    if not jnp.issubdtype(expected.dtype, jnp.floating):
        raise broken(14, f"the rewards are {expected.dtype} in place of floating-point numbers")
    _laws.assert_finite(13, "random texts", expected, "the reward")
    for fill in (0, vocab_size - 1):
        found = values(params, jnp.where(mask, tokens, fill), mask, length, index)
        same(15, f"id {fill} in every column beyond the mask", found, expected)
    every = jnp.asarray(_laws.mixed_ids(vocab_size, tokens.size).reshape(tokens.shape), tokens.dtype)
    same(
        15,
        "ids of every kind beyond the mask",
        values(params, jnp.where(mask, tokens, every), mask, length, index),
        expected,
    )
    for row in (0, size - 1):  # beside one text, in every other row, that of its neighbour
        others = jnp.where(jnp.arange(size) == row, row, (row + 1) % size)
        found = values(params, *take_rows((tokens, mask, length, index), others))
        same(8, f"row {row} beside other rows", found, expected, [row])
    order = jnp.asarray(_laws.other_rows(size))
    found = values(params, *take_rows((tokens, mask, length, index), order))
    same(16, f"rows {order.tolist()} of the texts, each with its index", found, expected[order])
    for side, extra in (("right", 3), ("left", 0), ("left", 3)):
        found = values(params, *_laws.repadded(tokens, mask, side, extra, 0), length, index)
        same(7, f"texts padded on the {side} with {extra} more columns", found, expected)
    prefix: PrefixReward | None = getattr(reward, "prefix", None)
    if prefix is not None:
        _check_prefix(prefix, params, prompts, responses, real, expected, rtol, atol)


def _check_prefix(
    prefix: PrefixReward,
    params: Params,
    prompts: TokenBatch,
    responses: Array,
    real: Array,
    expected: Array,
    rtol: float,
    atol: float,
) -> None:
    """Law 17: in one segment, in two, after a frozen step, and for an empty segment; law 1 for its states."""
    steps, size = responses.shape[1], responses.shape[0]
    init = jax.jit(prefix.init, static_argnums=2)
    score, commit = jax.jit(prefix.score), jax.jit(prefix.commit)
    half = jnp.arange(steps) < steps // 2
    # One width for all segments: the first half, the rest moved to the front, all, and none.
    first, rest, none = real & half, real & ~half, jnp.zeros_like(real)
    moved = mdp.compact(responses, rest)

    def same(law: int, when: str, found: Array, values: Array) -> None:
        assert_same(law, when, found[:, 0], values, rtol=rtol, atol=atol, whole="the reward")

    with errors_break(17, "the prefix form"):
        state = init(params, prompts, steps)
        whole, proposal = score(params, state, responses[:, None], real[:, None])
        if whole.shape != (size, 1):
            raise broken(17, f"prefix.score gives shape {whole.shape} in place of {(size, 1)}, one per segment")
        same(17, "the response as one segment", whole, expected)
        done = commit(params, state, proposal, jnp.zeros(size, jnp.int32))
        same(17, "an empty segment after it", score(params, done, responses[:, None], none[:, None])[0], expected)
        still = commit(params, state, proposal, jnp.full(size, -1, jnp.int32))
        found = score(params, still, responses[:, None], real[:, None])[0]
        same(2, "the response after a commit of choice -1", found, expected)
        _, begun = score(params, state, responses[:, None], first[:, None])
        partly = commit(params, state, begun, jnp.zeros(size, jnp.int32))
        found = score(params, partly, moved[0][:, None], moved[1][:, None])[0]
        same(17, "the response as two segments", found, expected)
        order = jnp.asarray(_laws.other_rows(size))
        found = score(params, take_rows(partly, order), moved[0][order][:, None], moved[1][order][:, None])[0]
        same(1, "the second segment after take_rows of the prefix's state", found, expected[order])
        parts = jnp.stack([responses, moved[0]], axis=1), jnp.stack([none, moved[1]], axis=1)
        both = np.asarray(score(params, partly, *parts)[0])
        same(17, "the second segment beside another", jnp.asarray(both[:, 1:]), expected)

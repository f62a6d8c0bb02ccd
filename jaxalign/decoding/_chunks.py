"""Prompts in chunks of a fixed size, so that a response is the same in every batch.

The last bits of a matrix product depend on how many rows it has. Here every chunk has G rows, each prompt is padded to
the bucket of its own length, on the left, and all chunks of a bucket run one compiled program: what a row gets depends
on the row alone, whatever else is in the batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, rollout
from jaxalign._arrays import take_rows
from jaxalign._checks import is_concrete, same_prompts
from jaxalign._parts import start_policy
from jaxalign.decoding.requests import count
from jaxalign.prompts import any_prompts, bucket, prompt_index
from jaxalign.types import Array, Completions, Params, Policy, Prompts, State, StepOutput, TokenBatch

T = TypeVar("T")


class Chunk(NamedTuple):
    """Some of the prompts at the width of their bucket."""

    rows: np.ndarray
    """[G], their places in the batch; the last one is repeated to fill the chunk up."""
    size: int
    """How many there are without repetitions."""
    prompts: Prompts
    """Their tokens, left-padded."""


class Given(NamedTuple):
    """Tokens that are scored in place of draws."""

    tokens: Array
    """[B,T] ids; -1: the token is drawn."""
    limits: Array
    """[B], tokens of each row."""


def chunks(prompts: Prompts, size: int) -> list[list[Chunk]]:
    """The prompts in chunks of `size` rows, a list for each bucket. ValueError where they are traced."""
    size = count("deterministic", size)
    prompts = same_prompts(prompts)
    leaves, form = jax.tree.flatten(prompts, is_leaf=lambda leaf: isinstance(leaf, TokenBatch))
    if not is_concrete(*jax.tree.leaves(leaves)):
        raise ValueError(
            "deterministic: expected prompts whose values are known on the host, found traced ones: a chunk that is "
            "compiled into a larger program is rounded as that program is, so call this outside jit"
        )
    index = np.asarray(_hosts.host_value(prompt_index(prompts)))
    read = [_hosts.host_value((batch.tokens, batch.mask)) for batch in leaves]
    rows = [[row[real] for row, real in zip(tokens, mask.astype(bool), strict=True)] for tokens, mask in read]
    groups: dict[tuple[int, ...], list[int]] = {}
    for b in range(len(index)):
        groups.setdefault(tuple(bucket(max(len(texts[b]), 1)) for texts in rows), []).append(b)
    found = []
    for widths, members in groups.items():
        group = []
        for begin in range(0, len(members), size):
            part = members[begin : begin + size]
            filled = np.asarray(part + [part[-1]] * (size - len(part)))
            batches = [_padded(texts, filled, width, index) for texts, width in zip(rows, widths, strict=True)]
            group.append(Chunk(filled, len(part), jax.tree.unflatten(form, batches)))
        found.append(group)
    return found


def _padded(texts: Sequence[np.ndarray], rows: np.ndarray, width: int, index: np.ndarray) -> TokenBatch:
    """The texts `rows` as a left-padded batch."""
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        begin = width - len(texts[row])
        tokens[i, begin:], mask[i, begin:] = texts[row], True
    return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(index[rows], jnp.int32))


def in_chunks(decode: Callable[[Any], T], prompts: Prompts, size: int) -> T:
    """Decodes prompts in chunks of a fixed size, each at the bucket of its own length, and puts the results together.

    One compiled program serves all chunks of a bucket, so that a prompt's result depends on the prompt, its index and
    `size`, and not on the batch or its padding. It does so for any decoder that draws from a prompt's index:
    in_chunks(lambda prompts: decoding.smc(policy, reward, params, rng, prompts, **options), prompts, 8).

    Args:
      decode: prompts of `size` rows -> a tree of arrays whose first axis is the prompts', such as Completions or
        Decoded. Numbers that differ per prompt have to come by the prompts' index.
      prompts: a TokenBatch [B,P], either padding, or a tree of them. Its values are read on the host.
      size: G >= 1, prompts in a chunk. The last chunk of a bucket is filled up with its last prompt.

    Returns:
      What `decode` gives, for the B prompts in their order.

    Raises:
      ValueError: a size below 1, traced prompts, or a result without an axis for the prompts.
    """
    parts = list(itertools.chain(*chunks(prompts, size)))
    found = [decode(part.prompts) for part in parts]
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(found)}
    if shapes - {(len(parts[0].rows),)}:
        raise ValueError(
            f"decode: expected arrays whose first axis is that of {len(parts[0].rows)} prompts, found first axes "
            f"{sorted(shapes)}"
        )
    return in_order(found, [part.rows[: part.size] for part in parts])


def in_order(parts: Sequence[T], rows: Sequence[np.ndarray]) -> T:
    """Leaves [G,...] of each chunk, of which the first len(rows) count, as leaves [B,...] in the order of the rows."""
    sizes = np.cumsum([0, *(len(jax.tree.leaves(part)[0]) for part in parts)])[:-1]
    places = np.concatenate([start + np.arange(len(part)) for start, part in zip(sizes, rows, strict=True)])
    whole: T = _ordered(list(parts), places[np.argsort(np.concatenate(rows))])
    return whole


@jax.jit
def _ordered(parts: list[Any], places: Array) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[places], *parts)


# Draws ----------------------------------------------------------------------------------------------------------------


def draw(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    samples: int,
    size: int,
    given: Given | None = None,
) -> Completions:
    """Draws samples 0..n-1 of each prompt, [B·n,T], `size` rows at a time; with `given` [B·n,T] it scores those tokens
    by the very same program."""
    start, draws = jax.random.split(rng)
    batch = any_prompts(prompts).tokens.shape[0]
    slices = per_prompt(policy, params, prompts, max_new_tokens)
    if given is None:
        tokens = np.full((batch * samples, max_new_tokens), -1, np.int32)
        given = Given(jnp.asarray(tokens), jnp.full(batch * samples, max_new_tokens, jnp.int32))
    parts: list[Completions] = []
    rows: list[np.ndarray] = []
    for group in chunks(prompts, size):
        members = np.concatenate([part.rows[: part.size] for part in group])
        index = np.concatenate([np.asarray(prompt_index(part.prompts))[: part.size] for part in group])
        kept: dict[int, tuple[State, StepOutput]] = {}
        for begin in range(0, len(members) * samples, size):
            # Row i of a group is sample i % n of its prompt i // n.
            own = np.arange(begin, min(begin + size, len(members) * samples))
            filled = np.concatenate([own, np.full(size - len(own), own[-1])])
            needed = range(own[0] // samples // size, own[-1] // samples // size + 1)
            for k in set(kept) - set(needed):
                del kept[k]
            for k in set(needed) - set(kept):
                own_params = at_rows(params, slices, group[k].rows)
                kept[k] = _start(policy, own_params, start, group[k].prompts, max_new_tokens)
            state, output = kept[needed[0]]
            if samples > 1:
                whole = [kept[k] for k in needed]
                state, output = _taken(whole, jnp.asarray(filled // samples - needed[0] * size))
            texts = members[filled // samples] * samples + filled % samples
            here = jnp.asarray(texts)
            parts.append(
                roll(
                    policy,
                    at_rows(params, slices, members[filled // samples]),
                    draws,
                    state,
                    output,
                    jnp.stack(
                        [jnp.asarray(index[filled // samples]), jnp.asarray(filled % samples, jnp.int32)], axis=1
                    ),
                    jnp.where(np.arange(size) < len(own), given.limits[here], 0),
                    given.tokens[here],
                    max_new_tokens,
                    eos_ids,
                )
            )
            rows.append(texts[: len(own)])
    return in_order(parts, rows)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _start(
    policy: Policy, params: Params, rng: Array, prompts: Prompts, max_new_tokens: int
) -> tuple[State, StepOutput]:
    return start_policy(policy, params, rng, prompts, max_new_tokens)


@jax.jit
def _taken(parts: list[Any], rows: Array) -> Any:
    return take_rows(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts), rows)


@functools.partial(jax.jit, static_argnums=(0, 8, 9))
def roll(
    policy: Policy,
    params: Params,
    rng: Array,
    state: State,
    output: StepOutput,
    rows: Array,
    limits: Array,
    tokens: Array,
    steps: int,
    eos_ids: tuple[int, ...],
) -> Completions:
    """Draws the tokens of a chunk where tokens [G,T] is -1, and takes those that are given. Sampling and scoring are
    one program, so that equal tokens have equal bits."""
    forced = rollout.Hooks(choose_token=lambda t, drawn: jnp.where(tokens[:, t] >= 0, tokens[:, t], drawn))
    return rollout.rollout(
        policy,
        params,
        rng,
        state,
        output,
        steps=steps,
        eos_ids=eos_ids,
        finished=limits < 1,
        rows=rows,
        limits=limits,
        last_step=False,
        hooks=forced,
    ).completions


# Parameters per prompt ------------------------------------------------------------------------------------------------


def per_prompt(policy: Policy, params: Params, prompts: Prompts, max_new_tokens: int) -> tuple[int, ...]:
    """Which leaves of params hold one value per prompt, as one beta for each.

    Of the leaves [B] these are those with which the policy starts B + 1 prompts if, and only if, they have B + 1
    values: its start is traced and not computed. ValueError where some of them are and others are not.
    """
    batch = any_prompts(prompts).tokens.shape[0]
    leaves, form = jax.tree.flatten(params)
    held = tuple(i for i, leaf in enumerate(leaves) if np.shape(leaf) == (batch,))
    if not held:
        return ()
    one_more = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((batch + 1, *x.shape[1:]), x.dtype))

    def starts(resized: tuple[int, ...]) -> bool:
        shaped = [jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in leaves]
        for i in resized:
            shaped[i] = one_more(shaped[i])
        opened = functools.partial(start_policy, policy, max_new_tokens=max_new_tokens)
        try:
            jax.eval_shape(
                lambda given, asked: opened(jax.tree.unflatten(form, given), jax.random.key(0), asked),
                shaped,
                one_more(prompts),
            )
        except (ValueError, TypeError, AssertionError):
            return False
        return True

    if starts(()):
        return ()
    if starts(held):
        return held
    raise ValueError(
        "deterministic: expected params whose values per prompt can be told from the model's own arrays, found several "
        f"of shape ({batch},); another number of prompts, or one value for all of them, can be told"
    )


def at_rows(params: Params, leaves: tuple[int, ...], rows: np.ndarray) -> Params:
    """Params with rows of the leaves that hold one value per prompt."""
    if not leaves:
        return params
    flat, form = jax.tree.flatten(params)
    return jax.tree.unflatten(form, [x[jnp.asarray(rows)] if i in leaves else x for i, x in enumerate(flat)])

"""What is checked on the host, before anything is traced: ValueErrors that name the field, what was expected and what
was found. Values of tracers are not looked at; shapes always are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.prompts import prompts_for
from jaxalign.types import ArrayLike, Critic, Params, Policy, Prompts, TokenBatch


def is_concrete(*trees: Any) -> bool:
    """True when no leaf is a tracer, so that values can be checked on the host."""
    return not any(isinstance(leaf, jax.core.Tracer) for tree in trees for leaf in jax.tree.leaves(tree))


def check_positive(name: str, value: ArrayLike) -> None:
    """ValueError on the host unless every entry of value is > 0 (NaN fails)."""
    if is_concrete(value) and not bool(np.all(np.asarray(value) > 0)):
        raise ValueError(f"{name}: expected a value > 0, found {np.asarray(value)}")


def entry(params: Params, name: str) -> Params:
    """params[name]. ValueError naming what is missing."""
    if not isinstance(params, Mapping) or name not in params:
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"params: expected an entry {name!r}, found {found}")
    return params[name]


def check_prompts(prompts: TokenBatch, *, name: str = "prompts") -> None:
    """Shapes always, values where they are concrete: tokens and mask [B,P], B and P at least 1, at least one real token
    in each row, index [B]."""
    tokens, mask, index = prompts
    if np.ndim(tokens) != 2 or np.shape(tokens) != np.shape(mask):
        raise ValueError(
            f"{name}: expected tokens and mask of one shape [B,P], found {np.shape(tokens)} and {np.shape(mask)}"
        )
    if 0 in np.shape(tokens):
        raise ValueError(f"{name}: expected at least one prompt and one token, found shape {np.shape(tokens)}")
    if index is not None and np.shape(index) != np.shape(tokens)[:1]:
        raise ValueError(f"{name}: expected index of shape {np.shape(tokens)[:1]}, found {np.shape(index)}")
    if is_concrete(mask):
        empty = np.flatnonzero(~np.asarray(mask, bool).any(axis=1))
        if empty.size:
            raise ValueError(
                f"{name}: expected at least one real token in each row, found none in rows {empty.tolist()}"
            )


def _batches(prompts: Prompts) -> list[tuple[str, TokenBatch]]:
    """(name, TokenBatch) of each entry. ValueError: no entry, or one of another type."""
    found = jax.tree_util.tree_leaves_with_path(prompts, is_leaf=lambda leaf: isinstance(leaf, TokenBatch))
    named = [("prompts" + jax.tree_util.keystr(path), leaf) for path, leaf in found]
    for name, leaf in named:
        if not isinstance(leaf, TokenBatch):
            raise ValueError(f"{name}: expected a TokenBatch, found {type(leaf).__name__}")
    if not named:
        raise ValueError(f"prompts: expected a TokenBatch or a dict that mirrors params, found {prompts!r}")
    return named


def same_prompts(prompts: Prompts) -> Prompts:
    """The prompts with one index [B] in every entry: given once, it holds for all; 0..B-1 where none is given.

    ValueError naming the entry: shapes (`check_prompts`), another batch size than the first entry's, or another index.
    """
    named = _batches(prompts)
    for name, batch in named:
        check_prompts(batch, name=name)
    first, size = named[0][0], np.shape(named[0][1].tokens)[0]
    for name, batch in named:
        if np.shape(batch.tokens)[0] != size:
            raise ValueError(f"{name}: expected {size} prompts as in {first}, found {np.shape(batch.tokens)[0]}")
    given = [(name, batch.index) for name, batch in named if batch.index is not None]
    for name, index in given:
        if is_concrete(index, given[0][1]) and not np.array_equal(np.asarray(index), np.asarray(given[0][1])):
            raise ValueError(f"{name}: expected the index of {given[0][0]}, {given[0][1]}, found {index}")
    index = given[0][1] if given else jnp.arange(size, dtype=jnp.int32)
    return jax.tree.map(
        lambda batch: batch._replace(index=index), prompts, is_leaf=lambda leaf: isinstance(leaf, TokenBatch)
    )


def check_has_logits(name: str, lm: Any) -> None:
    """ValueError for a model without vocabulary logits."""
    if not getattr(lm, "has_lm_head", True):
        raise ValueError(f"{name}: expected a language model, found a sequence classifier without lm_head")


def check_prompt_fits(lm: Any, prompts: TokenBatch, max_new_tokens: int, *, name: str = "prompts") -> None:
    """Host-side checks of a batch for a model: a full cache, a token id outside the vocabulary, an empty prompt.
    ValueErrors that name the field."""
    check_prompts(prompts, name=name)
    if not is_concrete(prompts.tokens, prompts.mask):
        return
    mask = np.asarray(prompts.mask, bool)
    longest = int(mask.sum(axis=1).max())
    if longest + max_new_tokens > lm.max_length:
        raise ValueError(
            f"{name}: expected prompt and new tokens within the model's context of {lm.max_length}, "
            f"found a prompt of {longest} tokens and max_new_tokens = {max_new_tokens}"
        )
    real = np.asarray(prompts.tokens)[mask]
    if real.min() < 0 or real.max() >= lm.vocab_size:
        raise ValueError(
            f"{name}: expected token ids in [0, {lm.vocab_size}), found ids from {real.min()} to {real.max()}"
        )


def check_part(part: Policy | Critic, params: Params, prompts: Prompts, max_new_tokens: int, name: str) -> None:
    """The host checks of a policy or critic that others are put on, with params[name] and its prompts."""
    entry(params, name)
    if part.check is not None:
        part.check(entry(params, name), prompts_for(prompts, name), max_new_tokens)


def check_same_vocabulary(name: str, left: Policy | Critic, right: Policy | Critic) -> None:
    """ValueError where both know their vocabulary and differ."""
    if left.vocab_size is not None and right.vocab_size is not None and left.vocab_size != right.vocab_size:
        raise ValueError(
            f"{name}: expected one vocabulary, found {left.vocab_size} and {right.vocab_size} tokens "
            "(models.match_vocabulary cuts appended rows)"
        )

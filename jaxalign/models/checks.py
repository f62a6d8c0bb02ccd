"""Checks of the arrays that enter a model (rank, type and width always, values where concrete), and names in errors."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from jaxalign._checks import is_concrete
from jaxalign.types import Array, ArrayLike


def integers(name: str, value: ArrayLike, axes: str) -> Array:
    """`value` as an array of integers with these axes, for instance "[B,L]". ValueError for another rank or type."""
    array = jnp.asarray(value)
    if array.ndim != axes.count(",") + 1 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers {axes}, found {array.dtype} of shape {array.shape}")
    return array


def real_tokens(
    name: str, tokens: ArrayLike, mask: ArrayLike | None, axes: str, vocab_size: int
) -> tuple[Array, Array]:
    """(tokens, mask as booleans; all True when None).

    ValueError: tokens that are not integers with these axes, a mask of another shape or type, or (where both are
    concrete) a real token outside the vocabulary, which a look-up would read from its end.
    """
    array = integers(name, tokens, axes)
    valid = valid_mask("mask", mask, array.shape, axes)
    if is_concrete(tokens, mask) and is_concrete(array, valid):
        real = np.asarray(array)[np.asarray(valid)]
        if real.size and (real.min() < 0 or real.max() >= vocab_size):
            raise ValueError(f"{name}: expected ids in [0, {vocab_size}), found ids from {real.min()} to {real.max()}")
    return array, valid


def valid_mask(name: str, mask: ArrayLike | None, shape: tuple[int, ...], axes: str) -> Array:
    """The mask as booleans, all True when None. ValueError for another shape, or numbers that are not integers."""
    if mask is None:
        return jnp.ones(shape, bool)
    array = jnp.asarray(mask)
    if array.shape != shape:
        raise ValueError(f"{name}: expected the shape {axes} of the tokens, {shape}, found {array.shape}")
    if array.dtype != bool and not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: expected booleans {axes}, True on real tokens, found {array.dtype}")
    return array.astype(bool)


def columns(at: ArrayLike, rows: tuple[int, ...], length: int, axes: str) -> Array:
    """`at` as columns of texts of `length` tokens, -1 as 0.

    ValueError: not integers with these axes or with other rows, or (where concrete) outside [-1, length).
    """
    array = integers("at", at, axes)
    if array.shape[: len(rows)] != rows:
        raise ValueError(f"at: expected the rows {rows} of the tokens, found shape {array.shape}")
    if is_concrete(array) and array.size:
        values = np.asarray(array)
        if values.min() < -1 or values.max() >= length:
            raise ValueError(
                f"at: expected columns in [0, {length}), or -1 for none, found {values.min()} to {values.max()}"
            )
    return jnp.maximum(array, 0)


def widths(name: str, value: Array, width: int) -> None:
    """ValueError unless the last axis of value is the hidden size and it holds floating-point numbers."""
    if value.ndim < 1 or value.shape[-1] != width or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name}: expected numbers [..., {width}], found {value.dtype} of shape {value.shape}")


def rows_of(name: str, value: Array, rows: int) -> None:
    """ValueError unless the first axis has as many rows as the cache."""
    if value.shape[0] != rows:
        raise ValueError(f"{name}: expected the cache's {rows} rows, found shape {value.shape}")


def named(names: Iterable[str]) -> str:
    """At most ten names in their order and how many there are, for messages; "none" without names."""
    found = list(names)
    if len(found) <= 10:
        return str(found) if found else "none"
    return f"{found[:10]} and {len(found) - 10} more"

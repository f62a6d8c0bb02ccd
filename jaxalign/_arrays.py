"""Array functions that every module needs: rows of trees, and numbers that stand for log 0."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
ArrayLike = jax.typing.ArrayLike

NEGATIVE = -1e20
"""The finite stand-in for log 0: far below any log-probability plus q/beta, far above overflow when divided by a
temperature. `is_supported` tests for it."""


def take_rows(tree: Any, index: Array) -> Any:
    """Rows `index` [M] of every leaf [B,...] of a state: [M,...]."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), tree)


def repeat_rows(tree: Any, n: int) -> Any:
    """Every row n times, neighbours together: leaf [B,...] -> [B·n,...]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), tree)


def where_rows(condition: Array, new: Any, old: Any) -> Any:
    """Row-wise choice between two trees of one structure; condition [B] bool, True takes `new`."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def per_row(value: ArrayLike, batch: int, *, name: str) -> Array:
    """A scalar or [B] value as float [B]: what is per prompt survives repeated rows (law 3). ValueError on other
    shapes."""
    array = at_least_float32(jnp.asarray(value))
    if array.shape not in ((), (batch,)):
        raise ValueError(f"{name}: expected a scalar or shape ({batch},), one per prompt, found shape {array.shape}")
    return jnp.broadcast_to(array, (batch,))


def at_least_float32(x: ArrayLike) -> Array:
    """float16, bfloat16 and integers to float32; float32 and float64 as they are."""
    array = jnp.asarray(x)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def is_supported(log_prob: Array) -> Array:
    """True where a log-probability is not the stand-in for log 0. NaN counts as inside, so that it shows."""
    return ~(log_prob <= NEGATIVE / 2)


def drop_weak_types(tree: Any) -> Any:
    """A tree without weakly typed leaves: jnp.asarray(0.5) and np.float32(0.5) would otherwise be two traces."""

    def strengthen(leaf: Any) -> Any:
        return jax.lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf

    return jax.tree.map(strengthen, tree)


def look_up(table: ArrayLike, index: ArrayLike, *, name: str = "table") -> Array:
    """Rows `index` [B] of a table [N,...] of numbers, in at least float32: [B,...].

    Plain indexing of a jax array takes the last row in silence where the index is past the end. Here that is a
    ValueError where the index is known on the host, and NaN where it is traced.

    Raises:
      ValueError: a table without an axis, or an index outside [0, N) that is known on the host.
    """
    array, rows = at_least_float32(table), jnp.asarray(index)
    if array.ndim < 1:
        raise ValueError(f"{name}: expected a table with a row for each prompt's index, found a scalar")
    if not isinstance(rows, jax.core.Tracer):
        outside = (rows < 0) | (rows >= array.shape[0])
        if bool(outside.any()):
            raise ValueError(
                f"{name}: expected a table with a row for each prompt's index, {rows}, found {array.shape[0]} rows"
            )
    rows = jnp.where(rows < 0, array.shape[0], rows)  # a negative index would count from the end
    return jnp.take(array, rows, axis=0, mode="fill", fill_value=jnp.nan)

"""Checks of what a collate function and a function of rows give: arrays of as many rows as went in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def checked_collate(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A collate function whose results are checked.

    Args:
      collate: a list of b rows -> a tree of arrays [b,...].

    Returns:
      The same function; it raises a ValueError where an array does not have b rows.
    """

    def checked(rows: list[Any]) -> Any:
        found = collate(rows)
        check_rows(getattr(collate, "__name__", "collate"), found, len(rows))
        return found

    return checked


def check_rows(name: str, tree: Any, count: int) -> None:
    """ValueError where a tree has no arrays, or one that has not `count` rows; name: of the function that gave it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    wrong = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in leaves if jnp.shape(x)[:1] != (count,)}
    if wrong or not leaves:
        raise ValueError(f"{name}: expected arrays of {count} rows, found {wrong or 'none'}")

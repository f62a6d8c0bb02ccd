"""Tables with a row per prompt, looked up by the prompt's index: never another prompt's row."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32
from jaxalign._checks import is_concrete
from jaxalign.types import Array, ArrayLike


def check_index(name: str, index: ArrayLike, rows: int) -> None:
    """Checks that each prompt's index is a row of a table.

    Args:
      name: what the error calls the table.
      index: the prompts' rows, any shape; not looked at while it is traced.
      rows: rows of the table.

    Raises:
      ValueError: an index below 0, or at or above `rows`.
    """
    if not is_concrete(index):
        return
    values = np.asarray(index)
    outside = values[(values < 0) | (values >= rows)]
    if outside.size:
        raise ValueError(
            f"{name}: expected a table with a row for each prompt's index, found {rows} rows for index "
            f"{np.unique(outside).tolist()}"
        )


def take_by_index(table: ArrayLike, index: Array, *, name: str) -> Array:
    """Reads a row of a table for each prompt.

    Args:
      table: [prompts, ...].
      index: [N], the prompts' rows in it.
      name: what the error calls the table.

    Returns:
      [N, ...], at least float32; NaN for an index that is traced and outside the table.

    Raises:
      ValueError: an index whose value is known and is outside the table.
    """
    array = at_least_float32(table)
    check_index(name, index, array.shape[0])
    # A negative index would count from the end: it is sent past the end, where there is nothing.
    place = jnp.where(index < 0, array.shape[0], index)
    return array.at[place].get(mode="fill", fill_value=jnp.nan)

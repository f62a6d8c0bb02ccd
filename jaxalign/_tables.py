"""Host checks of tables with a row per prompt, which `_arrays.look_up` reads at the prompt's index."""

from __future__ import annotations

import numpy as np

from jaxalign._checks import is_concrete
from jaxalign.types import ArrayLike


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

"""What collate and functions of rows give is checked by its rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.training import job


def collate(rows: list[int]) -> dict[str, np.ndarray]:
    return {"x": np.asarray(rows, np.float32)}


def test_rows_are_evaluated_in_batches_and_padding_is_cut_off():
    found = job.evaluate(lambda params, batch: params * batch["x"], jnp.asarray(2.0), [1, 2, 3], collate, 2)
    np.testing.assert_array_equal(found, [2, 4, 6])


def test_results_of_another_number_of_rows_are_named():
    def mean(params, batch):
        return batch["x"].mean()

    with pytest.raises(ValueError, match=r"mean: expected arrays of 2 rows, found \{'': \(\)\}"):
        job.evaluate(mean, None, [1, 2, 3], collate, 2)

    def first(rows):
        return {"x": np.zeros(2), "y": np.zeros((1, 2))}

    with pytest.raises(ValueError, match=r"first: expected arrays of 2 rows, found \{\"\['y'\]\": \(1, 2\)\}"):
        job.evaluate(lambda params, batch: batch["x"], None, [1, 2, 3], first, 2)

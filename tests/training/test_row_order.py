"""The order of rows: a function of seed and step."""

from __future__ import annotations

import numpy as np
import pytest

from jaxalign.data import batches


def collect(start, count: int) -> list[list[int]]:
    return [np.ravel(batch["x"]).tolist() for batch, _ in zip(start, range(count), strict=False)]


def test_the_order_of_rows_is_a_function_of_seed_and_step():
    def source(seed):
        return batches.batches(list(range(10)), lambda rows: {"x": np.array(rows)}, batch_size=4, seed=seed)

    first = collect(source(0)(0), 10)
    assert collect(source(0)(0), 10) == first
    assert collect(source(0)(6), 4) == first[6:]
    assert collect(source(1)(0), 10) != first
    flat = [x for batch in first for x in batch]
    epochs = [flat[i : i + 10] for i in (0, 10, 20, 30)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)  # each row once a pass
    assert len({tuple(epoch) for epoch in epochs}) == 4  # every pass is a new shuffle


def test_batches_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="rows: expected at least one"):
        batches.batches([], list, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="accumulate: expected a divisor of batch_size 4, found 3"):
        batches.batches([1], list, batch_size=4, seed=0, accumulate=3)


def test_fingerprints_differ_with_the_rows():
    rows = [("a", [1, 2]), ("b", [3])]
    assert batches.fingerprint(rows) == batches.fingerprint(list(rows))
    assert batches.fingerprint(rows) != batches.fingerprint(rows[::-1])

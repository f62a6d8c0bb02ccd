"""Rows of a data set as batches whose order is a function of (seed, step)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


def batches(
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    seed: int,
    accumulate: int = 1,
) -> Callable[[int], Iterator[Any]]:
    """Endless batches whose order is a function of the seed and the step.

    Each pass over the rows is a new shuffle of the seed; batch i holds the rows i·batch_size to (i+1)·batch_size of the
    endless sequence of shuffles.

    Args:
      rows: what the batches are made of.
      collate: makes arrays [b,...] (or nested dicts of them) of a list of rows.
      batch_size: rows of an optimizer step.
      seed: of the shuffles.
      accumulate: A micro-batches of b = batch_size/A rows, padded alike.

    Returns:
      A function that iterates over batches [A,b,...] from optimizer step i on.

    Raises:
      ValueError: no rows, or an A that does not divide batch_size.
    """
    import grain  # slow to import, and needed for training alone

    if not rows:
        raise ValueError("rows: expected at least one, found none")
    if batch_size < 1 or accumulate < 1 or batch_size % accumulate:
        raise ValueError(f"accumulate: expected a divisor of batch_size {batch_size}, found {accumulate}")

    def group(items: list[Any]) -> Any:
        return micro_batches(collate(list(items)), accumulate)

    # The rows themselves stay outside: grain would look into tuples of a source.
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
    grouped = order.batch(batch_size, batch_fn=list).map(lambda index: group([rows[i] for i in index]))

    def start(step: int) -> Iterator[Any]:
        return iter(grouped[step:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    return start


def micro_batches(arrays: Any, accumulate: int) -> Any:
    """Parts the rows of arrays.

    Args:
      arrays: [b,...], or nested dicts of them.
      accumulate: A, a divisor of b.

    Returns:
      The same, [A,b/A,...].
    """
    return _map(lambda x: x.reshape((accumulate, len(x) // accumulate, *x.shape[1:])), arrays)


def _map(f: Callable[[np.ndarray], np.ndarray], tree: Any) -> Any:
    return {k: _map(f, v) for k, v in tree.items()} if isinstance(tree, dict) else f(tree)


def fingerprint(rows: Sequence[Any]) -> str:
    """A short hash of rows of text or numbers (nested lists and tuples): whether a resumed run sees the same data."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()

"""What the scripts that train on preference pairs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxalign.data import encoded, preferences
from jaxalign.training import job, reading
from jaxalign.types import Params


def load(config: Any, begin: job.Start, *, tail: bool = False) -> tuple[job.Data, Callable[[list[Any]], Any]]:
    """(pairs of --data split by prompt, the function that pads a list of them).

    tail: whether what a chat template writes after a response is kept, as a reward model reads it."""
    loaded = reading.read_pairs(config, job.form_of(config, begin), tail=tail)
    return job.split(loaded, config), padding(config)


def padding(config: Any) -> Callable[[list[encoded.PairTokens]], dict[str, Any]]:
    """The function that pads a list of pairs to the bucket of the longest."""

    def collate(rows: list[encoded.PairTokens]) -> dict[str, Any]:
        longest = [len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in rows]
        return preferences.pad_pairs(rows, length=job.row_length(config, longest))

    return collate


def accuracy(
    score: Callable[[Params, Any], Any],
    params: Params,
    data: job.Data,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
) -> dict[str, Any]:
    """Share of held-out pairs whose chosen response scores higher (ties half) with its 95 % half-width, and the mean
    margin. score(params, batch) -> [b,2]: chosen, rejected."""
    if not data.validation:
        return {}
    scores = job.evaluate(score, params, data.validation, collate, batch_size)
    if not np.isfinite(scores).all():
        raise ValueError("validation: expected finite scores, found NaN or infinity")
    margin = scores[:, 0] - scores[:, 1]
    mean, half = job.interval((margin > 0) + 0.5 * (margin == 0))
    return {"pair_accuracy": mean, "pair_accuracy_95": half, "margin": float(margin.mean())}

"""Given responses, scored, as rows to learn values from: off-policy data for train.value --objective cd_q."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxalign import models
from jaxalign.data import encoded, preferences
from jaxalign.data.text_options import example_reading
from jaxalign.training import job, rollouts


def scored(config: rollouts.RolloutOptions, path: str, begin: job.Start) -> encoded.Loaded:
    """The texts of a file (`preferences.tokenize_texts`) as rows of `rollouts.Rollout`, each with the reward of
    --reward; row: its prompt's number in order of appearance. ValueErrors: a row without a prompt, a reward that is not
    finite."""
    found = preferences.tokenize_texts(
        path,
        job.form_of(config, begin),
        max_length=config.max_length,
        on_long=config.text.on_long or "cut",
        skip_bad=config.skip_bad,
        **example_reading(config.text),
    )
    bare = next((row.where for row in found.rows if not row.prompt), None)
    if bare is not None:
        raise ValueError(f'{bare}: expected a "prompt" beside the response, found none')
    lm, _ = models.load(config.base, dtype=config.dtype)
    reward, params = rollouts.judge(config.reward, lm, begin.tokenizer, dtype=config.dtype)
    number: dict[tuple[int, ...], int] = {}
    index = [number.setdefault(tuple(row.prompt), len(number)) for row in found.rows]

    def collate(rows: list[tuple[encoded.TextTokens, int]]) -> dict[str, np.ndarray]:
        # One shape for all: a reward may be a compiled model.
        texts = preferences.pad_texts([row for row, _ in rows], length=config.max_length)
        length = np.asarray([len(row.prompt) for row, _ in rows], np.int32)
        return texts | {"length": length, "index": np.asarray([i for _, i in rows], np.int32)}

    def score(params: Any, batch: Any) -> jax.Array:
        return reward(params, batch["tokens"], batch["mask"], batch["length"], batch["index"])

    rows = list(zip(found.rows, index, strict=True))
    paid = job.evaluate(score, params, rows, collate, config.decode_batch)
    bad = [row.where for row, value in zip(found.rows, paid, strict=True) if not np.isfinite(value)]
    if bad:
        raise ValueError(f"{bad[0]}: expected a finite reward, found none in {len(bad)} rows")
    values = [
        rollouts.Rollout(row.prompt, row.response, float(value), i) for (row, i), value in zip(rows, paid, strict=True)
    ]
    return found._replace(rows=values)

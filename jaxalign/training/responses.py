"""Given responses, scored, as rows to learn values from: off-policy data for train.value --objective cd_q."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxalign import models
from jaxalign._checks import check_language_model
from jaxalign.data import encoded, preferences
from jaxalign.training import job, rollouts
from jaxalign.training.options import RolloutOptions


def scored(
    found: encoded.Loaded, options: RolloutOptions, started: job.StartedModel, *, dtype: str, max_length: int
) -> encoded.Loaded:
    """Scores given responses.

    Args:
      found: rows of `encoded.TextTokens`.
      options: the base, whose tokens the reward is over, the reward, and how many rows are scored together.
      started: the model that learns from them.
      dtype: type that base and reward compute in.
      max_length: longest row [tokens].

    Returns:
      Rows of `rollouts.Rollout`, each with its reward; row: its prompt's number in order of appearance.

    Raises:
      ValueError: a row without a prompt, a reward that is not finite.
    """
    bare = next((row.where for row in found.rows if not row.prompt), None)
    if bare is not None:
        raise ValueError(f'{bare}: expected a "prompt" beside the response, found none')
    lm = models.LanguageModel(models.read_config(options.base), dtype, started.lm.mesh)
    check_language_model("base", lm, options.base)
    reward, params = rollouts.open_reward(options.reward, lm, started.tokenizer, dtype=dtype)
    number: dict[tuple[int, ...], int] = {}
    index = [number.setdefault(tuple(row.prompt), len(number)) for row in found.rows]

    def collate(rows: list[tuple[encoded.TextTokens, int]]) -> dict[str, np.ndarray]:
        # One shape for all: a reward may be a compiled model.
        texts = preferences.pad_texts([row for row, _ in rows], length=max_length)
        length = np.asarray([len(row.prompt) for row, _ in rows], np.int32)
        return texts | {"length": length, "index": np.asarray([i for _, i in rows], np.int32)}

    def score(params: Any, batch: Any) -> jax.Array:
        return reward(params, batch["tokens"], batch["mask"], batch["length"], batch["index"])

    rows = list(zip(found.rows, index, strict=True))
    values = job.evaluate(score, params, rows, collate, options.decode_batch)
    bad = [row.where for row, value in zip(found.rows, values, strict=True) if not np.isfinite(value)]
    if bad:
        raise ValueError(f"{bad[0]}: expected a finite reward, found none in {len(bad)} rows")
    scored_rows = [
        rollouts.Rollout(row.prompt, row.response, float(value), i)
        for (row, i), value in zip(rows, values, strict=True)
    ]
    return found._replace(rows=scored_rows)

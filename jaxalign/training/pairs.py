"""What the scripts that train on preference pairs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign import models
from jaxalign.data import encoded, preferences
from jaxalign.training import job, objectives
from jaxalign.types import Array, Params


def padding(max_length: int) -> Callable[[list[encoded.PairTokens]], dict[str, Any]]:
    """The function that pads a list of pairs to the bucket of the longest.

    Args:
      max_length: longest row [tokens].

    Returns:
      A list of b pairs -> {"chosen", "rejected"} of batches [b,L], as `preferences.pad_pairs`.
    """

    def collate(rows: list[encoded.PairTokens]) -> dict[str, Any]:
        longest = [len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in rows]
        return preferences.pad_pairs(rows, length=job.row_length(longest, max_length))

    return collate


def implicit_scores(lm: models.LanguageModel, *, beta: float) -> Callable[[tuple[Params, Params], Any], Array]:
    """DPO's implicit rewards of a batch of pairs, as `accuracy` takes them.

    Args:
      lm: the model that is trained.
      beta: KL weight [units of the implicit reward per nat].

    Returns:
      ((parameters, those of the reference), batch) -> [b,2]: of the chosen responses, of the rejected ones.
    """

    def score(both: tuple[Params, Params], batch: Any) -> Array:
        sides = (batch["chosen"], batch["rejected"])
        return jnp.stack([objectives.implicit_rewards(lm, *both, side, beta=beta) for side in sides], -1)

    return score


def accuracy(
    score: Callable[[Any, Any], Any],
    params: Params,
    data: job.Data,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
) -> dict[str, Any]:
    """The figures of summary.json of a model that scores pairs.

    Args:
      score: score(params, batch) -> [b,2]: of the chosen responses, of the rejected ones.
      params: the trained parameters.
      data: its held-out pairs are scored.
      collate: a list of b pairs -> a batch.
      batch_size: pairs scored together.

    Returns:
      Share of held-out pairs whose chosen response scores higher (ties half) with its 95 % half-width, and the mean
      margin; {} without held-out pairs.

    Raises:
      ValueError: scores that are not finite.
    """
    if not data.validation:
        return {}
    scores = job.evaluate(score, params, data.validation, collate, batch_size)
    if not np.isfinite(scores).all():
        raise ValueError("validation: expected finite scores, found NaN or infinity")
    margin = scores[:, 0] - scores[:, 1]
    mean, half = job.interval((margin > 0) + 0.5 * (margin == 0))
    return {"pair_accuracy": mean, "pair_accuracy_95": half, "margin": float(margin.mean())}

"""Best-of-n distillation: pairs from the samples of a calibration table, and the losses of them."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from jaxalign import _runs, models
from jaxalign.data import encoded
from jaxalign.training import objectives, roll_in, rollouts, tables
from jaxalign.training.options import RolloutOptions
from jaxalign.training.step import Loss


def best_of_n_margin(n: int) -> float:
    """Gives E[log pi_n/pi_ref(best) − log pi_n/pi_ref(worst)] of n samples, pi_n the best-of-n policy.

    Args:
      n: samples of a group, at least 1.

    Returns:
      (n−1)·H_{n−1} [nats], without ties: E of (n−1)·(log max − log min) of n uniforms.
    """
    return (n - 1) * sum(1 / k for k in range(1, n))


def bonbon(lm: models.LanguageModel, *, n: int, sft_weight: float) -> Loss:
    """Makes the loss weight·(−log pi(best)) + (1 − weight)·IPO(best, worst), IPO's target being `best_of_n_margin(n)`.

    Args:
      lm: the model that is trained; the loss takes its reference as `frozen`.
      n: samples of a group.
      sft_weight: weight of the likelihood [1], in (0, 1).

    Returns:
      A loss of batches {"chosen", "rejected"}, with metrics of the log-ratios: accuracy and margin.
    """
    return objectives.dpo(lm, beta=1 / (2 * best_of_n_margin(n)), objective="ipo", likelihood_weight=sft_weight)


def likelihood(lm: models.LanguageModel) -> Loss:
    """Makes the loss −log pi(best), the mean over rows.

    Args:
      lm: the model that is trained.

    Returns:
      A loss of the batches of `bonbon`.
    """
    sft = objectives.language_model(lm)
    return lambda params, batch, frozen: sft(params, batch["chosen"], frozen)


def table_options(folder: str) -> dict[str, Any]:
    """Option -> value that a calibration table was made with. ValueError for a folder without a table."""
    tables.read_about(folder)
    return dict(_runs.stored_options(pathlib.Path(folder)))


def check_table(folder: str, made: RolloutOptions, *, n: int, model: str) -> None:
    """Checks that a table's samples serve to distil a model.

    Args:
      folder: of train.calibrate.
      made: the options of its samples.
      n: samples of a group.
      model: folder of the model that is trained.

    Raises:
      ValueError: a table of another base, too few samples.
    """
    about = tables.read_about(folder)
    if about["base"] != tables.folder_digest(model):
        raise ValueError(f"model: expected the base that {folder} was made with, {made.base}, found {model}")
    if n > made.samples:
        raise ValueError(f"n: expected at most the table's {made.samples} samples per prompt, found {n}")


def check_shards(folder: str, made: RolloutOptions, *, prompts: int) -> None:
    """Checks that a table's samples are all there: they are drawn by train.calibrate alone, which locks its folder.

    Args:
      folder: of train.calibrate.
      made: the options of its samples.
      prompts: how many the table has.

    Raises:
      ValueError: shards that are missing, which are named.
    """
    paths = roll_in.shard_paths(pathlib.Path(folder) / "rollouts", -(-prompts // made.shard))
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(
            f"calibration: expected all {len(paths)} shards in {paths[0].parent}, found none of {missing}; remove the "
            f"summary.json in {folder} and repeat the train.calibrate that made it"
        )


def best_and_worst(found: list[rollouts.Rollout], n: int) -> Iterator[encoded.PairTokens]:
    """Pairs the best and the worst of each group of n samples of a prompt, in the order that they were drawn.

    Args:
      found: scored samples.
      n: samples of a group; what is left over of a prompt's samples is not used.

    Returns:
      A pair for each group; groups of one reward have no best and are left out.
    """
    for rows in rollouts.by_prompt(found).values():
        for first in range(0, len(rows) - n + 1, n):
            group = sorted(rows[first : first + n], key=lambda row: row.reward)
            if group[0].reward < group[-1].reward:
                where = f"prompt {group[0].row}, samples {first} to {first + n - 1}"
                yield encoded.PairTokens(group[0].prompt, group[-1].response, group[0].response, where)

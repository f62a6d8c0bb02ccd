"""The course of train.regress: rounds of fitting, each ended by its loss on held-out prompts, with fresh draws between
them and one correction of beta."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import infalign
from jaxalign._builders import cached
from jaxalign.data import encoded
from jaxalign.training import adapters, dry_run, fitting, job, regression, regression_best
from jaxalign.training.regression_best import Reading
from jaxalign.training.regression_options import RegressionOptions
from jaxalign.training.regression_task import Task, draw, first_parameters, log_ratios, measure, split_rows, whole
from jaxalign.types import Params

CORRECTED = 0.1
"""Share by which a measured KL may miss --target-kl without a correction."""


HELD_OUT = 1024
"""Most rows of held-out prompts that the loss is read from."""


def beta_of(options: RegressionOptions, samples: int) -> float:
    """The KL weight that the options say.

    Args:
      options: --beta, or --target-kl and the transform.
      samples: K of the table.

    Returns:
      beta.

    Raises:
      ValueError: a target_kl that the transform does not reach on K + 1 ranks.
    """
    if options.beta:
        return options.beta
    transform = infalign.parse_transform(options.transform or "identity")
    if options.transform == "log":
        transform = smoothed_log(samples)
    try:
        with jax.enable_x64(True):
            return float(infalign.match_kl(transform, kl=jnp.asarray(options.target_kl), samples=samples))
    except ValueError as error:
        raise ValueError(f"target_{error}") from error


@cached
def smoothed_log(samples: int) -> infalign.Transform:
    """log of ranks among K samples that are moved inside (0, 1), as `infalign.calibrate(smooth=True)` moves them."""
    return lambda c: infalign.log((c * samples + 0.5) / (samples + 1))


def run_rounds(task: Task, pool: regression.Pool) -> tuple[Params, job.Data, dict[str, Any]]:
    """Fits, draws and fits again, as many rounds as --refresh says, and corrects beta once, on fresh draws.

    Args:
      task: what all rounds share.
      pool: the base's samples.

    Returns:
      (what was trained, its rows, figures): beta, rounds' steps and counts, drawn, how many responses of policies were
      learned from, KL and win rate of further draws to prompts that were trained on and to held-out ones.
    """
    options, samples = task.options, task.table.shape[1]
    beta, trained = beta_of(options, samples), first_parameters(task)
    figures: dict[str, Any] = {"beta": beta}
    drew: list[Params] = []
    for number in range(options.refresh):
        if number:
            # A fit uses up what it begins with.
            drew.append(jax.tree.map(jnp.array, trained))
            pool = refreshed(task, pool, drew)
        folder = folder_of(task, str(number + 1) if number else "")
        trained, data, found = fit_round(task, pool, trained, beta, folder)
        figures |= found if options.refresh == 1 else {f"{name}_{number + 1}": value for name, value in found.items()}
    measured = measure(task, trained)
    if options.target_kl and abs(measured["kl_train"] / options.target_kl - 1) > CORRECTED:
        corrected = float(beta * (measured["kl_train"] / options.target_kl) ** 0.5)
        figures |= {"kl_before_correction": measured["kl_train"], "corrected_beta": corrected}
        print(
            f"regress: KL {measured['kl_train']:.3f}, asked {options.target_kl:g}: beta {beta:.4g} to {corrected:.4g}"
        )
        # Samples of the base do not show where the policy went beyond them.
        drew.append(jax.tree.map(jnp.array, trained))
        pool = refreshed(task, pool, drew)
        trained, data, found = fit_round(task, pool, trained, corrected, folder_of(task, "correction"), share=0.5)
        figures |= {f"{name}_correction": value for name, value in found.items()}
        measured = measure(task, trained)
    drawn = sum(response.round > 0 for response in pool.responses)
    return trained, data, figures | {"drawn": drawn} | measured


def folder_of(task: Task, name: str) -> pathlib.Path:
    """Where a round leaves checkpoints and metrics: the run folder for the first, rounds/NAME for others."""
    folder = task.job.out / "rounds" / name if name else task.job.out
    if name:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def fit_round(
    task: Task, pool: regression.Pool, trained: Params, beta: float, folder: pathlib.Path, *, share: float = 1.0
) -> tuple[Params, job.Data, dict[str, Any]]:
    """Fits the pool's responses, and keeps the parameters of the lowest loss on held-out prompts.

    Args:
      task: what all rounds share.
      pool: the responses.
      trained: where the round begins; used up.
      beta: KL weight.
      folder: of its checkpoints.
      share: of the steps that the options say.

    Returns:
      (what was trained, its rows, figures): steps, held_out_loss and the counts of `regression.groups_of`.
    """
    config = task.job.config
    groups, counts = regression.groups_of(task.options, pool, task.prompts, task.table, beta)
    data = task.job.split(encoded.Loaded(groups, 0, []))
    collate = regression.collating(config.rows.max_length)
    loss = regression.regression(task.started.lm, options=task.options)
    if task.spec is not None:
        loss = adapters.with_adapter(loss, task.spec)
    steps = max(round(share * config.optimizer.steps_for(len(data.train))), 1)
    held_out = _some(data.validation, HELD_OUT)
    read = reader(task, held_out, collate)
    told = dry_run.is_abstract((trained, task.frozen))
    if told:
        trained = dry_run.abstract(trained, None)
    watched, every = (read if data.validation and not told else None), config.optimizer.save_every
    with regression_best.watching(watched, folder, task.options, steps=steps, save_every=every) as watch:
        if not watch.ended:
            optimizer = dataclasses.replace(config.optimizer, steps=watch.steps, save_every=watch.save_every)
            trained = fitting.fit_model(
                task.started._replace(params=trained),
                data,
                loss,
                collate,
                optimizer=optimizer,
                mesh=config.mesh,
                seed=config.run.seed,
                stage=task.job.stage,
                out=folder,
                frozen=task.frozen,
                beside=task.reward[1],
                compared=task.spec is not None,
                hooks=watch.hooks,
            )
        trained, figures = watch.best(trained)
    return trained, data, figures | counts


def _some(rows: Sequence[regression.Group], most: int) -> Sequence[regression.Group]:
    """Rows at even distances, of all prompts alike."""
    return [rows[i] for i in np.linspace(0, len(rows) - 1, most).astype(int)] if len(rows) > most else rows


def reader(
    task: Task, rows: Sequence[regression.Group], collate: Callable[[list[Any]], Any]
) -> Callable[[Params], Reading]:
    """What reads the held-out rows under what is trained."""
    size = task.job.config.optimizer.batch_size
    target, weight = (np.asarray([getattr(row, name) for row in rows], np.float32) for name in ("target", "weight"))
    prompts = np.unique([repr(row.prompt) for row in rows], return_inverse=True)[1] if rows else np.zeros(0, int)

    def read(trained: Params) -> Reading:
        ratio = job.evaluate(
            regression.scoring(task.started.lm), (whole(task, trained), task.frozen), rows, collate, size
        )
        value = regression.objective(task.options, *map(jnp.asarray, (ratio, target, weight)))
        rho = np.exp(np.minimum(ratio, 20.0))
        each = (weight * (rho * ratio - rho + 1)).mean(axis=1)
        means = np.bincount(prompts, weights=each) / np.bincount(prompts)
        mean, half = job.interval(means)
        return Reading(float(value), float(np.mean(means) if mean is None else mean), 0.0 if half is None else half)

    return read


def refreshed(task: Task, pool: regression.Pool, drew: Sequence[Params]) -> regression.Pool:
    """Adds draws of the policy as it stands.

    Args:
      task: what all rounds share.
      pool: the responses so far.
      drew: what was trained when each round's responses were drawn; the last of them draws now.

    Returns:
      The pool with --refresh-samples more to each prompt that is trained on, of which a round learns from
      `regression.beside_draws`, with the log-ratios of all policies that drew.
    """
    rows = split_rows(task)[0]
    found = draw(task, drew[-1], rows, samples=task.options.refresh_samples, number=len(drew))
    responses = [*pool.responses, *found.responses]
    kept = regression.beside_draws(responses, task.job.config.run.seed)
    asked = set(rows)
    read = np.flatnonzero(kept & np.asarray([r.row in asked for r in responses]))
    log_ratio = np.zeros((len(drew) + 1, len(responses)))
    for number, params in enumerate(drew, 1):
        log_ratio[number, read] = log_ratios(task, params, [responses[i] for i in read])
    return regression.Pool(responses, log_ratio, kept)

"""What all rounds of train.regress share: model, base, table and samples; and the policy's own draws."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from jaxalign import models
from jaxalign.data import encoded
from jaxalign.data.text_options import TextOptions, ending_ids, format_of
from jaxalign.training import adapters, distillation, dry_run, reading, regression, rollouts, tables
from jaxalign.training import job as functions
from jaxalign.training.options import RolloutOptions, RunOptions
from jaxalign.training.regression_options import RegressionOptions
from jaxalign.training.training_job import Job
from jaxalign.types import Params, Reward

T = TypeVar("T")

MEASURED = 4
"""Responses to each held-out prompt that KL and win rate are read from."""
OWN_STREAM = 1 << 20
"""Number of the draws that the policy is measured by, which no round has."""


class TableSource(Protocol):
    """The config of the train.calibrate that made a table."""

    @property
    def run(self) -> RunOptions:
        """Its seed and type."""

    @property
    def rollouts(self) -> RolloutOptions:
        """How its samples were drawn."""

    @property
    def max_length(self) -> int:
        """Longest row [tokens]."""

    @property
    def text(self) -> TextOptions:
        """How its prompts became tokens."""


class Task(NamedTuple):
    """What all rounds share."""

    job: Job
    """The run."""
    options: RegressionOptions
    """Its targets and rounds."""
    drawn: RolloutOptions
    """As which the table's samples were drawn."""
    started: functions.StartedModel
    """The model, whose parameters are the base's."""
    spec: models.Lora | None
    """The adapter that is trained, None for all weights."""
    frozen: Params
    """The base's weights in the model's type."""
    prompts: Sequence[encoded.Prompt]
    """All of them."""
    table: np.ndarray
    """[P,K], sorted rewards of the base's samples."""
    reward: tuple[Reward, Params]
    """What scores draws."""


def open_task(
    job: Job,
    options: RegressionOptions,
    started: functions.StartedModel,
    spec: models.Lora | None,
    made: Mapping[str, TableSource],
) -> tuple[Task, regression.Pool]:
    """Reads tables and samples.

    Args:
      job: the run.
      options: the folders.
      started: the model.
      spec: the adapter that is trained, None for all weights.
      made: "table", and "fresh" where there is one -> the config of the train.calibrate that made it.

    Returns:
      The task, and the base's samples.

    Raises:
      ValueError: a table of another model, reward, tokenizer, template, limit or set of prompts, or without its
        samples.
    """
    source, form = made["table"], format_of(made["table"].text, started.tokenizer)
    room = source.max_length - source.rollouts.max_new_tokens
    prompts = reading.read_prompts(source.rollouts.prompts, form, text=source.text, room=room).rows
    sources = [prompt.source for prompt in prompts]
    ends = ending_ids(source.text, started.tokenizer, started.lm.eos_ids, sources)
    started = started._replace(lm=models.with_eos(started.lm, ends))
    about = tables.made_with(
        job.config.model.model,
        source.rollouts.reward,
        started.tokenizer,
        [prompt.tokens for prompt in prompts],
        max_new_tokens=source.rollouts.max_new_tokens,
        dtype=source.run.dtype,
    )
    found = {}
    for name, which in made.items():
        folder = getattr(options, name)
        kept = of_option(name, functools.partial(tables.read, folder, about, rows=len(prompts)))
        drawn = functools.partial(distillation.check_shards, folder, which.rollouts, prompts=len(prompts))
        of_option(name, drawn)
        found[name] = (
            kept,
            rollouts.roll_out(
                which.rollouts,
                prompts,
                started.tokenizer,
                run=which.run,
                out=pathlib.Path(folder),
                stage=job.stage,
                max_length=which.max_length,
                text=which.text,
                mesh=job.config.mesh.mesh,
            ),
        )
    if "fresh" in made and found["fresh"][0].about["seed"] == found["table"][0].about["seed"]:
        raise ValueError(f"fresh: expected samples of another seed than the table's {source.run.seed}, found the same")
    if dry_run.is_abstract(started.params):
        reward = rollouts.reward_shapes(source.rollouts.reward, dtype=source.run.dtype)
    else:
        reward = rollouts.open_reward(
            source.rollouts.reward,
            started.lm,
            started.tokenizer,
            dtype=source.run.dtype,
            sources=sources,
            text=source.text,
        )
    frozen = adapters.reference(spec, started)
    table = found["table"][0].reward
    task = Task(job, options, source.rollouts, started, spec, frozen, prompts, table, reward)
    return task, regression.pool_of(found["table"][1], found["fresh"][1] if "fresh" in made else [])


def of_option(name: str, read: Callable[[], T]) -> T:
    """What a reader of calibration tables gives, whose errors name the option that the folder is of."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(str(error).replace("calibration:", f"{name}:", 1)) from error


def final_parameters(task: Task, trained: Params) -> Params:
    """What `Job.finish` writes: the trained weights; an adapter's as `adapters.written` gives them."""
    if task.spec is None:
        return trained
    config = task.job.config
    return adapters.written(task.spec, task.started.lm, task.frozen, trained, task.job.out, base=config.model.model)


def first_parameters(task: Task) -> Params:
    """What is trained, before its first step."""
    if task.spec is None:
        return task.started.params
    lm = models.LanguageModel(task.started.lm.config)
    return models.lora.init(jax.random.fold_in(jax.random.key(task.job.config.run.seed), 2), lm, task.spec)


def whole(task: Task, trained: Params) -> Params:
    """The model's parameters in the type that it computes in."""
    params = trained if task.spec is None else models.lora.attach(task.frozen, trained, task.spec)
    return adapters.held(task.started.lm, params)


def split_rows(task: Task) -> tuple[list[int], list[int]]:
    """Rows of the prompts that are trained on, and of those that are held out."""
    made = [regression.Group(prompt.tokens, [], [], []) for prompt in task.prompts]
    held_out = {tuple(row.prompt) for row in task.job.split(encoded.Loaded(made, 0, [])).validation}
    parts: tuple[list[int], list[int]] = ([], [])
    for i, prompt in enumerate(task.prompts):
        parts[tuple(prompt.tokens) in held_out].append(i)
    return parts


def log_ratios(task: Task, trained: Params, responses: Sequence[regression.Response]) -> np.ndarray:
    """log pi/pi_ref [R] of responses under what was trained."""
    groups = [regression.Group(task.prompts[r.row].tokens, [r.tokens], [0.0], [1.0]) for r in responses]
    config = task.job.config
    collate, size = regression.collating(config.rows.max_length), config.optimizer.batch_size
    both = whole(task, trained), task.frozen
    found = functions.evaluate(regression.scoring(task.started.lm), both, groups, collate, size)
    return np.asarray(found[:, 0], np.float64)


def draw(task: Task, trained: Params, rows: Sequence[int], *, samples: int, number: int) -> regression.Measured:
    """Scored responses of what was trained to the prompts of some rows; `regression.draw`."""
    reward, reward_params = task.reward
    return regression.draw(
        task.started.lm,
        whole(task, trained),
        task.frozen,
        reward,
        reward_params,
        task.prompts,
        rows,
        samples=samples,
        number=number,
        seed=task.job.config.run.seed,
        max_new_tokens=task.drawn.max_new_tokens,
        decode_batch=task.drawn.decode_batch,
    )


def measure(task: Task, trained: Params) -> dict[str, Any]:
    """KL and win rate over the base of the policy's own draws to prompts that were trained on ("_train") and to
    held-out ones ("_held_out")."""
    out: dict[str, Any] = {}
    for name, rows, samples in zip(("train", "held_out"), split_rows(task), (1, MEASURED), strict=True):
        if rows:
            found = draw(task, trained, rows, samples=samples, number=OWN_STREAM)
            out |= regression.figures_of(found, task.table, name)
    return out

"""Distil best-of-n into a language model, from the samples of a calibration table:

python -m train.distil --model DIR --calibration runs/table --n 8 --out runs/distil

The samples of each prompt are dealt into groups of n; in each the best and the worst by reward are kept. bonbon (arXiv
2406.00832): likelihood of the best, and IPO between best and worst with the margin that the best-of-n policy has on
average, (n-1)·H(n-1) nats; sft: the likelihood alone. The third way, vBoN, is train.rl --transform log --beta 1/(n-1):
with exact ranks its optimum IS the best-of-n policy. --model is the base that the table was made with, whose roll-outs
serve again.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Literal

from jaxalign import commands
from jaxalign._options import from_fields
from jaxalign.data import encoded
from jaxalign.data.text_options import TextOptions, format_of
from jaxalign.training import adapters, distillation, pairs, reading, rollouts
from jaxalign.training.options import (
    AdapterOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RowOptions,
    RunOptions,
    check_training_config,
)
from jaxalign.training.training_job import Job

from . import calibrate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.distil."""

    run: RunOptions
    calibration: str
    """Folder of train.calibrate, whose samples are used."""
    n: int = 4
    """Samples of a group; at most the table's samples per prompt."""
    loss: Literal["bonbon", "sft"] = "bonbon"
    """bonbon: likelihood of the best and IPO against the worst; sft: likelihood of the best alone."""
    sft_weight: float = 0.005
    """With bonbon: weight of the likelihood, the rest is IPO's, in (0, 1)."""
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    rows: RowOptions = dataclasses.field(default_factory=RowOptions)
    optimizer: OptimizerOptions = dataclasses.field(
        default_factory=functools.partial(OptimizerOptions, learning_rate=1e-6)
    )
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    adapters: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    check_training_config(config)
    adapter = adapters.spec_of(config.adapters)
    if config.n < 2:
        raise ValueError(f"n: expected at least 2, found {config.n}")
    if not 0 < config.sft_weight < 1:
        raise ValueError(f"sft_weight: expected a share in (0, 1), found {config.sft_weight}")
    source = from_fields(calibrate.Config, distillation.table_options(config.calibration), where=config.calibration)
    distillation.check_table(config.calibration, source.rollouts, n=config.n, model=config.model.model)
    job = Job.open(
        config,
        stage="distil",
        inputs=[f"{config.calibration}/rollouts"],
        following=lambda out: (
            f"python -m eval.decode --model {config.model.model} --reward REWARD --prompts FILE "
            f"--method policy:{out / 'model'} --out DIR"
        ),
    )
    done = job.finished()
    if done is not None:
        return done
    started = job.start(lambda _: None, texts_per_row=2, trained=adapter is None)
    room = source.max_length - source.rollouts.max_new_tokens
    form = format_of(source.text, started.tokenizer)
    prompts = reading.read_prompts(source.rollouts.prompts, form, text=source.text, room=room).rows
    distillation.check_shards(config.calibration, source.rollouts, prompts=len(prompts))
    table: dict[str, Any] = {"run": source.run, "out": pathlib.Path(config.calibration), "stage": "distil"}
    limits: dict[str, Any] = {"max_length": source.max_length, "text": source.text, "mesh": config.mesh.mesh}
    found = rollouts.roll_out(source.rollouts, prompts, started.tokenizer, **table, **limits)
    rows = list(distillation.best_and_worst(found, config.n))
    if not rows:
        raise ValueError(f"calibration: expected samples of different rewards in {config.calibration}, found none")
    data = job.split(encoded.Loaded(rows, 0, []))

    collate = pairs.padding(config.rows.max_length)
    if config.loss == "sft":
        loss = distillation.likelihood(started.lm)
    else:
        loss = distillation.bonbon(started.lm, n=config.n, sft_weight=config.sft_weight)
    reference = adapters.reference(adapter, started)
    params = job.fit(started, data, loss, collate, frozen=reference, adapter=adapter)
    score = pairs.implicit_scores(started.lm, beta=1.0)
    summary = pairs.accuracy(score, (params, reference), data, collate, config.optimizer.batch_size)
    summary |= {"wanted_margin": distillation.best_of_n_margin(config.n), "pairs": len(rows)}
    return job.finish(started, params, data, summary)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

"""Align a language model with a calibrated reward by regression, from a table of base samples, without roll-outs:

python -m train.regress --table runs/table --transform exp:10 --target-kl 0.5 --out runs/regress

The optimum of E[Phi(C)] - beta KL(pi || pi_ref) is known up to a number of each prompt, and with calibrated rewards
that number is known as well: its log-ratio to the base is Phi(C)/beta - log Z. This job fits the policy's log-ratio to
it (QRPO, arXiv 2507.08068; here in three forms, docs/methods/regression.md) on the samples that train.calibrate left.
It draws none but to measure, with --refresh, and where the KL misses --target-kl. summary.json holds KL and win rate
over the base on prompts that were trained on and on held-out ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxalign import commands, rewards
from jaxalign._options import from_fields
from jaxalign.data.text_options import TextOptions
from jaxalign.training import adapters, distillation, regression_rounds, regression_task
from jaxalign.training.options import (
    AdapterOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RowOptions,
    RunOptions,
)
from jaxalign.training.regression_options import RegressionOptions, check_regression_options
from jaxalign.training.training_job import Job, check_length

from . import calibrate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.regress."""

    run: RunOptions
    regression: RegressionOptions
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    rows: RowOptions = dataclasses.field(default_factory=functools.partial(RowOptions, validation=0.1))
    optimizer: OptimizerOptions = dataclasses.field(
        default_factory=functools.partial(OptimizerOptions, batch_size=64, learning_rate=1e-5)
    )
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    adapters: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    options, spec = config.regression, adapters.spec_of(config.adapters)
    check_regression_options(options)
    made = {
        name: from_fields(
            calibrate.Config,
            regression_task.of_option(name, functools.partial(distillation.table_options, folder)),
            where=folder,
        )
        for name, folder in (("table", options.table), ("fresh", options.fresh))
        if folder
    }
    if not (config.model.model or config.model.architecture):
        model = dataclasses.replace(config.model, model=made["table"].rollouts.base)
        config = dataclasses.replace(config, model=model)
    job = Job.open(
        config,
        stage="regress",
        inputs=[f"{getattr(options, name)}/rollouts" for name in made],
        following=lambda out: (
            f"python -m eval.decode --model {config.model.model} --reward REWARD --prompts FILE "
            f"--method policy:{out / 'model'} --out DIR"
        ),
        beside=rewards.reward_roles(made["table"].rollouts.reward),
    )
    done = job.finished()
    if done is not None:
        return done
    if not config.run.dry_run and any((job.out / "rounds").glob("*")):
        check_length(job.out, config.optimizer, "whose policy has drawn for its later rounds")
    size = options.group if options.normaliser == "centred" else 1
    started = job.start(lambda _: None, texts_per_row=size, trained=spec is None)
    task, pool = regression_task.open_task(job, options, started, spec, made)
    trained, data, summary = regression_rounds.run_rounds(task, pool)
    return job.finish(task.started, regression_task.final_parameters(task, trained), data, summary)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

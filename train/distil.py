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
import json
import pathlib
from typing import Any, Literal

import jax.numpy as jnp

from jaxalign import commands
from jaxalign._options import from_fields
from jaxalign.data import encoded
from jaxalign.training import adapters, distillation, objectives, pairs, rollouts, tables
from jaxalign.training.job import check_training_options, split
from jaxalign.training.training_job import Job

from . import calibrate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(adapters.AdapterOptions):
    """Options of train.distil."""

    calibration: str
    """Folder of train.calibrate, whose samples are used."""
    n: int = 4
    """Samples of a group; at most the table's samples per prompt."""
    loss: Literal["bonbon", "sft"] = "bonbon"
    """bonbon: likelihood of the best and IPO against the worst; sft: likelihood of the best alone."""
    sft_weight: float = 0.005
    """With bonbon: weight of the likelihood, the rest is IPO's, in (0, 1)."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW; small models take more."""


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    check_training_options(config)
    adapters.spec_of(config)
    if config.n < 2:
        raise ValueError(f"n: expected at least 2, found {config.n}")
    if not 0 < config.sft_weight < 1:
        raise ValueError(f"sft_weight: expected a share in (0, 1), found {config.sft_weight}")
    source = _source(config)
    job = Job.open(
        config,
        stage="distil",
        inputs=[config.model, config.architecture, f"{config.calibration}/rollouts"],
        following=lambda out: (
            f"python -m eval.decode --model {config.model} --reward REWARD --prompts FILE "
            f"--method policy:{out / 'model'} --out DIR"
        ),
    )
    done = job.finished()
    if done is not None:
        return done
    begin = job.start(lambda _: None)
    found = rollouts.roll_out(source, pathlib.Path(config.calibration), begin.tokenizer, stage="distil")
    rows = list(distillation.best_and_worst(found, config.n))
    if not rows:
        raise ValueError(f"calibration: expected samples of different rewards in {config.calibration}, found none")
    data = split(encoded.Loaded(rows, 0, []), config)

    collate = pairs.padding(config)
    if config.loss == "sft":
        loss = distillation.likelihood(begin.lm)
    else:
        loss = distillation.bonbon(begin.lm, n=config.n, sft_weight=config.sft_weight)
    reference = adapters.reference(config, begin)
    params = job.fit(begin, data, loss, collate, frozen=reference)

    def score(both: Any, batch: Any) -> Any:
        own, reference = both
        sides = (batch["chosen"], batch["rejected"])
        return jnp.stack([objectives.implicit_rewards(begin.lm, own, reference, side, beta=1.0) for side in sides], -1)

    summary = pairs.accuracy(score, (params, reference), data, collate, config.batch_size)
    summary |= {"wanted_margin": distillation.best_of_n_margin(config.n), "pairs": len(rows)}
    return job.finish(begin, params, data, summary)


def _source(config: Config) -> calibrate.Config:
    """The options that the table's samples were drawn with. ValueErrors: no table, another base, too few samples."""
    path = pathlib.Path(config.calibration)
    if not (path / tables.ABOUT).is_file():
        raise ValueError(f"calibration: expected a folder of train.calibrate, found no {tables.ABOUT} in {path}")
    made = json.loads((path / "config.json").read_text())
    source = from_fields(calibrate.Config, made, where=str(path / "config.json"))
    about = json.loads((path / tables.ABOUT).read_text())
    if about["base"] != tables.folder_digest(config.model):
        raise ValueError(f"model: expected the base that {path} was made with, {source.base}, found {config.model}")
    if config.n > source.samples:
        raise ValueError(f"n: expected at most the table's {source.samples} samples per prompt, found {config.n}")
    return source


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

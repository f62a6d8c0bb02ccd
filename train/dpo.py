"""Train a language model by direct preference optimisation:

python -m train.dpo --data pairs.jsonl --model DIR --out runs/dpo

The reward is implicit, beta·log(pi/pi_ref)(y|x), and the reference is the model that the run starts from (DPO, arXiv
2305.18290; IPO, arXiv 2310.12036). The data is that of train.reward_model. The result is an aligned model, decoded by
itself, or the baseline whose roll-outs steer another model (Transfer Q*). With --lora-rank an adapter is trained and
written to adapter/; the weights under it are the reference, at no cost. summary.json holds the accuracy and the
margin of the implicit reward on held-out pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

from jaxalign import commands
from jaxalign.data.text_options import CompareOptions, TextOptions
from jaxalign.training import adapters, objectives, pairs, reading
from jaxalign.training.options import (
    AdapterOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RowOptions,
    RunOptions,
    check_finite,
)
from jaxalign.training.training_job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.dpo."""

    run: RunOptions
    data: str
    """Preference pairs: files, folders or a data set's name (docs/data.md)."""
    loss: Literal["dpo", "ipo"] = "dpo"
    """dpo: logistic loss of the margin; ipo: squared distance of the difference of log-ratios to 1/(2·beta)."""
    beta: float = 0.1
    """KL weight [units of the implicit reward per nat]; for ipo the paper's tau."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round, in [0, 0.5); dpo alone."""
    compare: CompareOptions = dataclasses.field(default_factory=CompareOptions)
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
    read = functools.partial(
        reading.read_pairs, config.data, rows=config.rows, text=config.text, compare=config.compare
    )
    if config.text.show:
        return reading.show(read, config.text, model=config.model.model, tokenizer=config.model.tokenizer)
    adapter = adapters.spec_of(config.adapters)
    check_finite(config, "beta", above=True)
    if not 0 <= config.label_smoothing < 0.5 or (config.label_smoothing and config.loss != "dpo"):
        raise ValueError(
            f"label_smoothing: expected a share in [0, 0.5), and 0 for ipo, found {config.label_smoothing} for "
            f"{config.loss}"
        )
    job = Job.open(
        config,
        stage="dpo",
        inputs=[config.data],
        following=lambda out: (
            f"python -m eval.decode --model {config.model.model or 'BASE'} --method transfer:{out / 'model'}@1 "
            "--reward REWARD_DIR --prompts FILE --out DIR"
        ),
    )
    done = job.finished()
    if done is not None:
        return done
    started = job.start(lambda _: None, texts_per_row=2, trained=adapter is None)
    data = job.split(read(job.form(started)))
    collate = pairs.padding(config.rows.max_length)
    loss = objectives.dpo(started.lm, beta=config.beta, objective=config.loss, label_smoothing=config.label_smoothing)
    reference = adapters.reference(adapter, started)
    params = job.fit(started, data, loss, collate, frozen=reference, adapter=adapter)
    score = pairs.implicit_scores(started.lm, beta=config.beta)
    summary = pairs.accuracy(score, (params, reference), data, collate, config.optimizer.batch_size)
    return job.finish(started, params, data, summary)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

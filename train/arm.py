"""Train GenARM's autoregressive reward model on preference pairs:

python -m train.arm --data pairs.jsonl --model DIR --out runs/arm

A language model whose log-likelihood of a response is its reward (arXiv 2410.08193, eq. 5): no reference model, sums
over the response's tokens, no length normalisation. The data is that of train.reward_model. summary.json holds the
accuracy on held-out pairs with its 95 % interval.

With --lora-rank the model is an adapter of the frozen --model: adapter/ holds it alone, in peft's form, model/ merged.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

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
)
from jaxalign.training.training_job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.arm."""

    run: RunOptions
    data: str
    """Preference pairs: files, folders or a data set's name (docs/data.md)."""
    beta_r: float = 0.05
    """Scale of the log-likelihood in the loss [1]: the paper's beta_r."""
    compare: CompareOptions = dataclasses.field(default_factory=CompareOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    rows: RowOptions = dataclasses.field(default_factory=RowOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
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
    if not config.beta_r > 0:
        raise ValueError(f"beta_r: expected a value > 0, found {config.beta_r}")
    adapter = adapters.spec_of(config.adapters)
    job = Job.open(
        config,
        stage="arm",
        inputs=[config.data],
        following=lambda out: (
            f"python -m eval.decode --model BASE --method genarm:{out / 'model'}@1 --prompts FILE --out DIR"
        ),
    )
    done = job.finished()
    if done is not None:
        return done
    started = job.start(lambda _: None, texts_per_row=2, trained=adapter is None)
    data = job.split(read(job.form(started)))
    collate = pairs.padding(config.rows.max_length)
    loss = objectives.autoregressive_reward(started.lm, beta_r=config.beta_r)
    params = job.fit(started, data, loss, collate, adapter=adapter)

    def score(params: Any, batch: Any) -> Any:
        cast = objectives.cast(started.lm, params)
        return jnp.stack([objectives.log_likelihoods(started.lm, cast, batch[s]) for s in ("chosen", "rejected")], -1)

    summary = pairs.accuracy(score, params, data, collate, config.optimizer.batch_size)
    return job.finish(started, params, data, summary)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

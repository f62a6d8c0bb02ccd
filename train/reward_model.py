"""Train a Bradley-Terry reward model on preference pairs:

python -m train.reward_model --data pairs.jsonl --model DIR --out runs/reward

A scalar head is read where transformers reads it: at the last token of prompt and response, EOS included, that is not
the tokenizer's pad id. Where the pad id is the EOS that is the token before it. The pad id is written to config.json.
With --pooling mean the head reads the mean of the hidden states of the text's tokens instead, which learns from fewer
pairs what is spread over a text; config.json says so ("classifier_pooling"), and transformers does not read it.
The data is JSON lines (or .jsonl.gz, .parquet) with {"prompt", "chosen", "rejected"}, transcripts {"chosen",
"rejected"} in the form of hh-rlhf, or lists of chat messages. summary.json holds the accuracy on held-out pairs with
its 95 % interval.

With --lora-rank an adapter and the head are trained on the frozen --model: adapter/ holds both, in peft's form, with
the tokenizer, by whose pad id it is read; model/ is merged. With --frozen the head alone is trained, on a body that
stays as it is: the better choice where pairs are few.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp

from jaxalign import commands, models
from jaxalign.data.text_options import CompareOptions, TextOptions
from jaxalign.training import adapters, objectives, pairs, reading, values
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
    """Options of train.reward_model."""

    run: RunOptions
    data: str
    """Preference pairs: files, folders or a data set's name (docs/data.md)."""
    compare: CompareOptions = dataclasses.field(default_factory=CompareOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    rows: RowOptions = dataclasses.field(default_factory=RowOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    adapters: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)
    pooling: Literal["own", "last", "mean"] = "own"
    """How the head reads a text: last, at the token at which transformers reads it; mean, from the mean of the hidden
    states of its tokens; own, as --model does, last where it is no reward model."""
    frozen: bool = False
    """Train the head alone; the other weights stay."""


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    read = functools.partial(
        reading.read_pairs, config.data, rows=config.rows, text=config.text, compare=config.compare, tail=True
    )
    if config.text.show:
        return reading.show(read, config.text, model=config.model.model, tokenizer=config.model.tokenizer)
    adapter = adapters.spec_of(config.adapters)
    if config.frozen and adapter is not None:
        raise ValueError(f"lora_rank: expected 0 with --frozen, found {config.adapters.lora_rank}")
    job = Job.open(
        config,
        stage="reward_model",
        inputs=[config.data],
        following=lambda out: (
            f"python -m eval.decode --model BASE --method args:{out / 'model'}@1 --prompts FILE --out DIR"
        ),
    )
    done = job.finished()
    if done is not None:
        return done
    trained = adapter is None and not config.frozen
    started = job.start(functools.partial(_head, config.pooling), texts_per_row=2, trained=trained)
    data = job.split(read(job.form(started)))
    collate = pairs.padding(config.rows.max_length)
    loss = objectives.bradley_terry(started.lm)
    if config.frozen:
        params = values.fit_head(job, started, data, loss, collate, store=False)
    else:
        params = job.fit(started, data, loss, collate, adapter=adapter)

    def score(params: Any, batch: Any) -> Any:
        cast = objectives.cast(started.lm, params)
        return jnp.stack([objectives.rewards_of(started.lm, cast, batch[side]) for side in ("chosen", "rejected")], -1)

    summary = pairs.accuracy(score, params, data, collate, config.optimizer.batch_size)
    return job.finish(started, params, data, summary)


def _head(pooling: Literal["own", "last", "mean"], config: models.Config) -> models.Head:
    return models.Head("reward", pooling=config.reward_pooling if pooling == "own" else pooling)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

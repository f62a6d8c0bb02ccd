"""Train a Bradley-Terry reward model on preference pairs:

python -m train.reward_model --data pairs.jsonl --model DIR --out runs/reward

A scalar head is read where transformers reads it: at the last token of prompt and response, EOS included, that is not
the tokenizer's pad id. Where the pad id is the EOS that is the token before it. The pad id is written to config.json.
The data is JSON lines (or .jsonl.gz, .parquet) with {"prompt", "chosen", "rejected"}, transcripts {"chosen",
"rejected"} in the form of hh-rlhf, or lists of chat messages. summary.json holds the accuracy on held-out pairs with
its 95 % interval.

With --lora-rank an adapter and the head are trained on the frozen --model: adapter/ holds both, in peft's form, with
the tokenizer, by whose pad id it is read; model/ is merged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxalign import commands, models
from jaxalign.data.text_options import CompareOptions
from jaxalign.training import objectives, pairs, reading
from jaxalign.training.adapters import AdapterOptions
from jaxalign.training.training_job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Options of train.reward_model."""

    data: str
    """Preference pairs: files, folders or a data set's name (docs/data.md)."""
    compare: CompareOptions = dataclasses.field(default_factory=CompareOptions)
    """Which responses make a pair."""


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    if config.text.show:
        return reading.show(config, "read pairs", model=config.model)
    job = Job.open(
        config,
        stage="reward_model",
        inputs=[config.data, config.model, config.architecture, config.tokenizer],
        following=lambda out: (
            f"python -m eval.decode --model BASE --method args:{out / 'model'}@1 --prompts FILE --out DIR"
        ),
    )
    done = job.finished()
    if done is not None:
        return done
    begin = job.start(lambda _: models.Head("reward"))
    data, collate = pairs.load(config, begin, tail=True)
    params = job.fit(begin, data, objectives.bradley_terry(begin.lm), collate)

    def score(params: Any, batch: Any) -> Any:
        cast = objectives.cast(begin.lm, params)
        return jnp.stack([objectives.rewards_of(begin.lm, cast, batch[side]) for side in ("chosen", "rejected")], -1)

    summary = pairs.accuracy(score, params, data, collate, config.batch_size)
    return job.finish(begin, params, data, summary)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

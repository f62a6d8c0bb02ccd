"""Train GenARM's autoregressive reward model on preference pairs:

python -m train.arm --data pairs.jsonl --model DIR --out runs/arm

A language model whose log-likelihood of a response is its reward (arXiv 2410.08193, eq. 5): no reference model, sums
over the response's tokens, no length normalisation. The data is that of train.reward_model. summary.json holds the
accuracy on held-out pairs with its 95 % interval.

With --lora-rank the model is an adapter of the frozen --model: adapter/ holds it alone, in peft's form, model/ merged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxalign import commands
from jaxalign.data.text_options import CompareOptions
from jaxalign.training import adapters, objectives, pairs, reading
from jaxalign.training.training_job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(adapters.AdapterOptions):
    """Options of train.arm."""

    data: str
    """Preference pairs: files, folders or a data set's name (docs/data.md)."""
    compare: CompareOptions = dataclasses.field(default_factory=CompareOptions)
    """Which responses make a pair."""
    beta_r: float = 0.05
    """Scale of the log-likelihood in the loss [1]: the paper's beta_r."""


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    if config.text.show:
        return reading.show(config, "pairs", model=config.model)
    if not config.beta_r > 0:
        raise ValueError(f"beta_r: expected a value > 0, found {config.beta_r}")
    adapters.spec_of(config)
    job = Job.open(
        config,
        stage="arm",
        inputs=[config.data, config.model, config.architecture, config.tokenizer],
        following=lambda out: (
            f"python -m eval.decode --model BASE --method genarm:{out / 'model'}@1 --prompts FILE --out DIR"
        ),
    )
    done = job.finished()
    if done is not None:
        return done
    begin = job.start(lambda _: None)
    data, collate = pairs.load(config, begin)
    loss = objectives.autoregressive_reward(begin.lm, beta_r=config.beta_r)
    params = job.fit(begin, data, loss, collate)

    def score(params: Any, batch: Any) -> Any:
        cast = objectives.cast(begin.lm, params)
        return jnp.stack([objectives.log_likelihoods(begin.lm, cast, batch[s]) for s in ("chosen", "rejected")], -1)

    summary = pairs.accuracy(score, params, data, collate, config.batch_size)
    return job.finish(begin, params, data, summary)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

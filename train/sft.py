"""Train a language model on texts, from a Hugging Face folder or from random weights:

python -m train.sft --data texts.jsonl --model DIR --out runs/sft
python -m train.sft --data texts.jsonl --architecture config.json --tokenizer DIR --out runs/sft

The data is JSON lines (or .jsonl.gz, .parquet) with {"prompt", "response"}, {"text"}, {"messages"}, or preference
pairs, whose chosen response counts. The loss is over the response's tokens, its EOS included.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign import commands
from jaxalign.data import encoded, preferences
from jaxalign.data.encoded import Learn
from jaxalign.data.text_options import CompareOptions, TextOptions
from jaxalign.training import objectives, reading
from jaxalign.training.job import row_length
from jaxalign.training.options import MeshOptions, ModelOptions, OptimizerOptions, RowOptions, RunOptions
from jaxalign.training.training_job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.sft."""

    run: RunOptions
    data: str
    """Texts, chats or preference pairs: files, folders or a data set's name (docs/data.md)."""
    learn: Learn = "all"
    """Which of the assistant's turns of a conversation are learned: all, or the last."""
    compare: CompareOptions = dataclasses.field(default_factory=CompareOptions)
    """Which response of a preference counts."""
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    rows: RowOptions = dataclasses.field(default_factory=RowOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    read = functools.partial(
        reading.read_texts,
        config.data,
        rows=config.rows,
        text=config.text,
        compare=config.compare,
        learn=config.learn,
    )
    if config.text.show:
        return reading.show(read, config.text, model=config.model.model, tokenizer=config.model.tokenizer)
    job = Job.open(
        config,
        stage="sft",
        inputs=[config.data],
        following=lambda out: f"python -m eval.decode --model {out / 'model'} --prompts FILE --out DIR",
    )
    done = job.finished()
    if done is not None:
        return done
    started = job.start(lambda _: None)
    data = job.split(read(job.form(started)))

    def collate(rows: list[encoded.TextTokens]) -> dict[str, np.ndarray]:
        length = row_length([len(row.prompt) + len(row.response) for row in rows], config.rows.max_length)
        return preferences.pad_texts(rows, length=length)

    params = job.fit(started, data, objectives.language_model(started.lm), collate)

    def score(params: Any, batch: Any) -> tuple[Any, Any]:
        cast = objectives.cast(started.lm, params)
        return objectives.log_likelihoods(started.lm, cast, batch), jnp.sum(batch["loss_mask"][:, 1:], axis=-1)

    summary: dict[str, Any] = {}
    if data.validation:
        total, count = job.evaluate(score, params, data.validation, collate)
        loss = -float(total.sum() / count.sum())
        summary = {"validation_loss": loss, "validation_perplexity": float(np.exp(loss))}
    return job.finish(started, params, data, summary)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

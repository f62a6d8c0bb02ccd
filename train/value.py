"""Train a value model for controlled decoding on its own roll-outs:

python -m train.value --base DIR --prompts prompts.jsonl --reward DIR --out runs/value

The base answers every prompt; a reward model (--reward DIR) or a program (--reward module:function) scores the answers;
the model learns the value of each prefix. Roll-outs are written in numbered shards: an interrupted run goes on with the
first shard that is missing, and no prompt is lost or repeated.

With --bound the reward is shaped first (Stackelberg): bound above each prompt's threshold, which is solved from its
roll-outs, and 0 below. The exact heads for eval.decode's --method follower:DIR are

python -m train.value --objective exceedance --bound 3 --beta 1 --samples 16 … --out runs/exceedance
python -m train.value --objective soft --bound 3 --beta 1 --sharpness 2 … --out runs/soft

The exact mean of cd_q learns the base's value from anybody's responses, since its target needs no draw of the base; the
others learn from --responses the value of whoever wrote them. A response without EOS is scored as it stands:

python -m train.value --objective cd_q --head q --responses responses.jsonl …

The law of the reward is one head for every beta, bound and n, eval.decode's --method distribution:DIR:soft@0.5,1,2:

python -m train.value --objective distribution … --out runs/laws

RE-Control's value network, a head on the base's own hidden states, for policies.re_control:

python -m train.value --objective td --frozen --activation relu --head-layers 2 … --out runs/edit
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

from jaxalign import commands
from jaxalign.data import encoded
from jaxalign.data.text_options import TextOptions, format_of
from jaxalign.training import reading, responses, roll_in, rollouts, values
from jaxalign.training.options import (
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RolloutOptions,
    RowOptions,
    RunOptions,
)
from jaxalign.training.training_job import Job
from jaxalign.training.value_options import ValueOptions, check_value_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.value."""

    run: RunOptions
    rollouts: RolloutOptions = dataclasses.field(default_factory=functools.partial(RolloutOptions, prompts=""))
    """The roll-outs of a base, with their rewards; given --responses, none are made."""
    value: ValueOptions = dataclasses.field(default_factory=ValueOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    rows: RowOptions = dataclasses.field(default_factory=RowOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


def run(config: Config) -> dict[str, Any]:
    """Rolls out, trains, writes the run folder, gives its summary."""
    options, rolled, rows = config.value, config.rollouts, config.rows
    room = rows.max_length - rolled.max_new_tokens
    prompts = functools.partial(reading.read_prompts, rolled.prompts, text=config.text, room=room)
    texts = functools.partial(reading.read_texts, options.responses, rows=rows, text=config.text)
    if config.text.show:
        return reading.show(texts if options.responses else prompts, config.text, model=rolled.base)
    if not (config.model.model or config.model.architecture):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, model=rolled.base))
    check_value_options(options, rolled, model=config.model.model)
    job = Job.open(
        config,
        stage="value",
        inputs=[*rollouts.inputs(rolled), options.responses, *values.inputs(options)],
        drawn=rolled,
        following=lambda out: _following(config, out),
    )
    if (done := job.finished()) is not None:
        return done
    config = roll_in.after_rounds(config, job.out, run)
    options = config.value
    started = job.start(lambda body: values.value_head(options, body), trained=not options.frozen)
    if options.responses:
        given = texts(job.form(started))
        found = responses.scored(given, rolled, started, dtype=config.run.dtype, max_length=rows.max_length)
    else:
        read = prompts(format_of(config.text, started.tokenizer)).rows
        found = encoded.Loaded(rollouts.roll_out_for(job, rolled, read, started, values.rolls_in(options)), 0, [])
    learned = values.value_rows(options, found.rows)
    data = job.split(found._replace(rows=learned))
    started = values.with_support(options, started, learned)
    collate = values.collate_values(options, rows.max_length)
    loss, frozen = values.value_loss(options, started, base=rolled.base, dtype=config.run.dtype)
    if options.frozen:
        params = values.fit_head(job, started, data, loss, collate, store=options.store_states)
    else:
        params = values.fit_all(job, started, data, loss, collate, frozen=frozen)

    summary = values.measure_values(options, started.lm, params, learned, data, collate, config.optimizer.batch_size)
    return job.finish(started, params, data, summary, values.about_laws(options, rolled, started, learned))


def _following(config: Config, out: pathlib.Path) -> str:
    method = values.following(config.value, str(out / "model"))
    return f"python -m eval.decode --model {config.rollouts.base} --method {method} --prompts FILE --out DIR"


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

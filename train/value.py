"""Train a value model for controlled decoding on its own roll-outs:

python -m train.value --base DIR --prompts prompts.jsonl --reward DIR --out runs/value

The base answers every prompt; a reward model (--reward DIR) or a program (--reward module:function) scores the answers;
the model learns the value of each prefix. Roll-outs are written in numbered shards: an interrupted run goes on with the
first shard that is missing, and no prompt is lost or repeated.

With --bound the reward is shaped first (Stackelberg): bound above each prompt's threshold, which is solved from its
roll-outs, and 0 below. The exact heads for decoding by tokens are then

python -m train.value --objective exceedance --bound 3 --beta 1 --samples 16 … --out runs/exceedance
python -m train.value --objective soft --bound 3 --beta 1 --sharpness 2 … --out runs/soft

which eval.decode takes as --method follower:DIR, at that beta.

The exact mean of cd_q learns the base's value from anybody's responses, since its target needs no draw of the base:

python -m train.value --objective cd_q --head q --responses responses.jsonl …

The other objectives learn from --responses the value of whoever wrote them. A response without EOS ("truncated") is
scored as it stands: its last kept token is terminal.

RE-Control's value network, a head on the base's own hidden states for policies.re_control, is

python -m train.value --objective td --frozen --activation relu --head-layers 2 … --out runs/edit
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jaxalign import commands, models
from jaxalign.data import encoded
from jaxalign.training import objectives, reading, responses, rollouts, values
from jaxalign.training.job import split
from jaxalign.training.training_job import Job
from jaxalign.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(values.ValueOptions):
    """Options of train.value."""


def run(config: Config) -> dict[str, Any]:
    """Rolls out, trains, writes the run folder, gives its summary."""
    if config.text.show:
        return reading.show(config, "prompts", model=config.base)
    if not (config.model or config.architecture):
        config = dataclasses.replace(config, model=config.base)
    values.check_value_options(config)
    job = Job.open(
        config,
        stage="value",
        inputs=[*rollouts.inputs(config), config.responses],
        following=lambda out: _following(config, out),
    )
    done = job.finished()
    if done is not None:
        return done
    begin = job.start(lambda body: values.value_head(config, body))
    if config.responses:
        found = responses.scored(config, config.responses, begin)
    else:
        found = encoded.Loaded(rollouts.roll_out(config, job.out, begin.tokenizer, stage="value"), 0, [])
    rows = values.value_rows(config, found.rows)
    data = split(found._replace(rows=rows), config)

    collate = values.collate_values(config)
    base: Any = None
    frozen: Params = None
    if config.objective == "cd_q":
        base, frozen = models.load_beside(config.base, begin.lm, begin.tokenizer, name="base", dtype=config.dtype)
    loss = objectives.value(
        begin.lm,
        config.objective,
        base=base,
        beta=config.beta or None,
        pair_weight=config.pair_weight,
        before=config.frozen,
    )
    if config.frozen:
        # The body is no parameter of the run: neither gradients nor moments of it are made, and no decay reaches it.
        frozen = {"transformer": begin.params["transformer"]}
        train = lambda params, batch, frozen: loss({**frozen, **params}, batch, None)  # noqa: E731
        alone = begin._replace(params={"head": begin.params["head"]})
        params = job.fit(alone, data, train, collate, frozen=frozen)
        params = {**frozen, **params}
    else:
        params = job.fit(begin, data, loss, collate, frozen=frozen)

    summary = values.measure_values(config, begin.lm, params, rows, data)
    return job.finish(begin, params, data, summary)


def _following(config: Config, out: pathlib.Path) -> str:
    method = f"follower:{out / 'model'}" if values.log_weight(config) else f"value:{out / 'model'}@1"
    if config.frozen:
        method = f"re_control:{out / 'model'}@1"
    return f"python -m eval.decode --model {config.base} --method {method} --prompts FILE --out DIR"


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

"""Train the leader of Stackelberg reward shaping, through the follower's closed form, on roll-outs of a base:

python -m train.shaping --leader reward_model --base DIR --model REWARD_DIR --prompts FILE --reward GOLD --out DIR
python -m train.shaping --leader network --base DIR --prompts FILE --reward GOLD --out DIR
python -m train.shaping --amortise --base DIR --prompts FILE --reward GOLD --out DIR

The true utility u of every roll-out is --reward (a folder, or MODULE:FUNCTION). The follower weighs the roll-outs of a
prompt by softmax(r/beta); the leader maximises the sum of weight·u over its reward r in [0, bound].

reward_model: r = bound·sigmoid(head) of a transformer, trained end to end; afterwards it needs no true utility.
network: r is a monotone function of u and of the prompt's statistics.
--amortise: a head on the prompt's last token learns the threshold by expectile regression: none need be sampled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxalign import commands, models
from jaxalign.data import encoded
from jaxalign.training import leaders, reading, rollouts, shaping_data
from jaxalign.training.job import split
from jaxalign.training.training_job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(shaping_data.ShapingOptions):
    """Options of train.shaping."""


def run(config: Config) -> dict[str, Any]:
    """Rolls out, trains, writes the run folder, gives its summary."""
    if config.text.show:
        return reading.show(config, "prompts", model=config.base)
    if not (config.model or config.architecture):
        config = dataclasses.replace(config, model=config.base)
    shaping_data.check_shaping_options(config)
    network = config.leader == "network" and not config.amortise
    decode = f"python -m eval.decode --model {config.base}"
    job = Job.open(
        config,
        stage="threshold" if config.amortise else "leader",
        inputs=rollouts.inputs(config),
        following=lambda out: (
            "docs/stackelberg.md"
            if config.amortise or network
            else f"{decode} --reward {out / 'model'} --method best_of_n@16 --prompts FILE --out DIR"
        ),
        product=leaders.NETWORK if network else "model",
    )
    done = job.finished()
    if done is not None:
        return done
    bound = config.bound if config.leader == "reward_model" and not config.amortise else None
    begin = job.start(lambda _: models.Head("reward", bound=bound))
    found = shaping_data.prompt_groups(rollouts.roll_out(config, job.out, begin.tokenizer, stage="shaping"))
    data = split(encoded.Loaded(found, 0, []), config)
    if config.amortise:
        return leaders.train_threshold(job, begin, data)
    if network:
        return leaders.train_network(job, begin, data)
    return leaders.train_reward_model(job, begin, data)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

"""Train the leader of Stackelberg reward shaping, through the follower's closed form, on roll-outs of a base:

python -m train.shaping --leader reward_model --base DIR --model REWARD_DIR --prompts FILE --reward GOLD --out DIR
python -m train.shaping --leader network --base DIR --prompts FILE --reward GOLD --out DIR
python -m train.shaping --amortise --base DIR --prompts FILE --reward GOLD --out DIR

The true utility u of every roll-out is --reward (a folder, or MODULE:FUNCTION). The follower weighs the roll-outs of a
prompt by softmax(r/beta); the leader maximises the sum of weight·u over its reward r in [0, bound].

reward_model: r = bound·sigmoid(head) of a transformer, trained end to end, or with --lora-rank an adapter and the head
  alone; afterwards it needs no true utility. --follower tokens|smc|trained puts another follower in place of the closed
  form on the roll-outs: python -m train.shaping --base DIR --lora-rank 8 --follower tokens … trains a leader on the
  base's own weights, whose reward guides the base token by token.

network: r is a monotone function of u and of the prompt's statistics.

--amortise: a head on the prompt's last token learns the threshold by expectile regression: none need be sampled.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxalign import commands, models
from jaxalign.data import encoded
from jaxalign.data.text_options import TextOptions, format_of
from jaxalign.training import adapters, followers, leaders, reading, rollouts, shaping_data
from jaxalign.training.options import (
    AdapterOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RolloutOptions,
    RowOptions,
    RunOptions,
)
from jaxalign.training.shaping_data import ShapingOptions
from jaxalign.training.training_job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.shaping."""

    run: RunOptions
    rollouts: RolloutOptions = dataclasses.field(default_factory=functools.partial(RolloutOptions, samples=16))
    """The roll-outs of a base, with their true utility."""
    shaping: ShapingOptions = dataclasses.field(default_factory=ShapingOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    rows: RowOptions = dataclasses.field(default_factory=RowOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=functools.partial(OptimizerOptions, batch_size=8))
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    adapters: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


def run(config: Config) -> dict[str, Any]:
    """Rolls out, trains, writes the run folder, gives its summary."""
    room = config.rows.max_length - config.rollouts.max_new_tokens
    read = functools.partial(reading.read_prompts, config.rollouts.prompts, text=config.text, room=room)
    if config.text.show:
        return reading.show(read, config.text, model=config.rollouts.base)
    if not (config.model.model or config.model.architecture):
        model = dataclasses.replace(config.model, model=config.rollouts.base)
        config = dataclasses.replace(config, model=model)
    options = config.shaping
    adapter = adapters.spec_of(config.adapters)
    shaping_data.check_shaping_options(options, config.rollouts, adapter)
    followers.check_drawing(options, config.mesh, config.run)
    network = options.leader == "network" and not options.amortise
    decode = f"python -m eval.decode --model {config.rollouts.base}"
    job = Job.open(
        config,
        stage="threshold" if options.amortise else "leader",
        inputs=rollouts.inputs(config.rollouts),
        drawn=config.rollouts,
        following=lambda out: (
            "docs/stackelberg.md"
            if options.amortise or network
            else f"{decode} --reward {out / 'model'} --method best_of_n@16 --prompts FILE --out DIR"
        ),
        product=leaders.NETWORK if network else "model",
    )
    done = job.finished()
    if done is not None:
        return done
    bound = options.bound if options.leader == "reward_model" and not options.amortise else None
    texts = 1 if network or options.amortise else config.rollouts.samples
    head = lambda config: models.Head("reward", bound=bound, pooling=config.reward_pooling)  # noqa: E731
    started = job.start(head, texts_per_row=texts, trained=adapter is None)
    prompts = read(format_of(config.text, started.tokenizer)).rows
    shaping_data.check_held_out(prompts, validation=config.rows.validation, seed=config.run.seed)
    found = rollouts.roll_out_for(job, config.rollouts, prompts, started)
    data = job.split(encoded.Loaded(shaping_data.prompt_groups(found), 0, []))
    if options.amortise:
        return leaders.train_threshold(job, options, started, data)
    if network:
        return leaders.train_network(job, options, started, data)
    follower = None
    if options.follower in followers.DRAWN:
        own, rolled = config.model.model or config.model.tokenizer, config.rollouts
        follower = followers.open_follower(
            options, rolled, started, prompts, run=config.run, text=config.text, model=own
        )
    return leaders.train_reward_model(job, options, started, data, follower, adapter=adapter)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

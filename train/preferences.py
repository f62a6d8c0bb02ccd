"""Make preference pairs of a model's own samples, labelled by a reward as a noisy reader would:

python -m train.preferences --base DIR --prompts FILE --reward MODULE:FUNCTION --samples 8 --noise 0.25 --out runs/pairs

The base answers each prompt, in shards from which an interrupted job goes on. Samples 1 and 2 of a prompt make a
pair, 3 and 4 another, and so on; the first is preferred with probability sigmoid((r1 − r2) / noise), Bradley and
Terry's model. pairs.jsonl is read by train.reward_model, train.arm and train.dpo. It says of each side whether the
limit cut it: such a response has no end, and none is learned. With a true utility as the reward, what is learned from
the pairs can be judged by it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxalign import _hosts, _io, _runs, commands, models
from jaxalign.data.text_options import TextOptions, ending_ids, format_of
from jaxalign.training import dry_run, job, labels, mesh_checks, reading, rollouts
from jaxalign.training.options import RolloutOptions, RunOptions, check_finite, check_rollout_options

PAIRS = "pairs.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.preferences."""

    run: RunOptions
    rollouts: RolloutOptions
    """The samples of the base, with their rewards."""
    noise: float = 0.25
    """Difference of rewards at which the better response is preferred with probability 0.73 [units of reward]."""
    max_length: int = 256
    """Longest row [tokens], prompt and response; a longer roll-out is an error."""
    mesh: str = ""
    """Devices by axis, data=N or as in data=2,fsdp=4,tensor=2, -1 for the rest of them (docs/scale.md)."""
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


def run(config: Config) -> dict[str, Any]:
    """Samples, labels, writes the run folder, gives its summary."""
    options = config.rollouts
    room = config.max_length - options.max_new_tokens
    read = functools.partial(reading.read_prompts, options.prompts, text=config.text, room=room)
    if config.text.show:
        return reading.show(read, config.text, model=options.base)
    check_rollout_options(options)
    check_finite(config, "noise", above=True)
    if options.samples < 2:
        raise ValueError(f"samples: expected at least 2 responses to compare, found {options.samples}")
    if config.run.dry_run:
        dry_run.on_enough_devices(config, config.mesh)
    mesh_checks.check_rollouts(options, config.mesh)
    tokenizer = models.tokenizer(options.base, chat_template=config.text.chat_template)
    if config.run.dry_run:
        prompts = read(format_of(config.text, tokenizer)).rows
        needed = rollouts.tell_memory(options, prompts, dtype=config.run.dtype, stage="preferences", mesh=config.mesh)
        raise dry_run.Told(needed)
    out = _runs.open_run(config.run.out, config, inputs=rollouts.inputs(options), later=True)
    following = f"python -m train.reward_model --data {out / PAIRS} --model {options.base} --out DIR"
    done = job.finished(out, product=PAIRS)
    if done is None:
        prompts = read(format_of(config.text, tokenizer)).rows
        found = rollouts.roll_out(
            options,
            prompts,
            tokenizer,
            run=config.run,
            out=out,
            stage="preferences",
            max_length=config.max_length,
            text=config.text,
            mesh=config.mesh,
        )
        sources = [prompt.source for prompt in prompts]
        ends = ending_ids(config.text, tokenizer, models.read_config(options.base).eos_ids, sources)
        rows, done = labels.noisy_pairs(found, sources, tokenizer, ends, noise=config.noise, seed=config.run.seed)
        if _hosts.is_first():
            _io.write_lines(out / PAIRS, rows)
        _io.write_json(out / "summary.json", done)
    job.report(out, done, following, product=PAIRS)
    return done


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

"""Make the calibration table of a reward: where a response's reward stands among the base's own for its prompt.

python -m train.calibrate --base DIR --prompts FILE --reward REWARD --samples 100 --out runs/table

Draws K responses of the base for each prompt, once, in shards from which an interrupted job goes on, and keeps their
sorted rewards (InfAlign, arXiv 2412.19792, eq. 12). train.rl --calibration reads the table; it is refused for another
model, reward, tokenizer, template, limit or set of prompts than those that made it. Small K blur the top: with K
samples, nothing above the best of K is told apart.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from typing import Any

import numpy as np

from jaxalign import _io, _runs, commands, models
from jaxalign.data.text_options import TextOptions, format_of
from jaxalign.training import dry_run, job, mesh_checks, reading, rollouts, tables
from jaxalign.training.options import RolloutOptions, RunOptions, check_rollout_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.calibrate."""

    run: RunOptions
    rollouts: RolloutOptions = dataclasses.field(
        default_factory=functools.partial(RolloutOptions, samples=100, decode_batch=512)
    )
    """The responses of the base, with their rewards."""
    max_length: int = 256
    """Longest row [tokens], prompt and response; a longer roll-out is an error."""
    mesh: str = ""
    """Devices by axis, data=N or as in data=2,fsdp=4,tensor=2, -1 for the rest of them (docs/scale.md)."""
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


def run(config: Config) -> dict[str, Any]:
    """Makes the table, gives the run's summary."""
    options = config.rollouts
    room = config.max_length - options.max_new_tokens
    read = functools.partial(reading.read_prompts, options.prompts, text=config.text, room=room)
    if config.text.show:
        return reading.show(read, config.text, model=options.base)
    check_rollout_options(options)
    if config.run.dry_run:
        dry_run.on_enough_devices(config, config.mesh)
    mesh_checks.check_rollouts(options, config.mesh)
    if options.samples < 2:
        raise ValueError(f"samples: expected at least 2 responses to rank among, found {options.samples}")
    if config.run.dry_run:
        tokenizer = models.tokenizer(options.base, chat_template=config.text.chat_template)
        prompts = read(format_of(config.text, tokenizer)).rows
        needed = rollouts.tell_memory(options, prompts, dtype=config.run.dtype, stage="calibrate", mesh=config.mesh)
        raise dry_run.Told(needed)
    # No `Job`: nothing is trained, and a table takes the place of a model.
    out = _runs.open_run(config.run.out, config, inputs=rollouts.inputs(options), later=True)
    following = f"python -m train.rl --model {options.base} --prompts {options.prompts} --reward "
    following += f"{shlex.quote(options.reward)} "
    following += f"--calibration {out} --max-new-tokens {options.max_new_tokens} --transform exp:10 --out DIR"
    done = job.finished(out, product=tables.REWARDS, beside=(tables.ABOUT,))
    if done is None:
        tokenizer = models.tokenizer(options.base, chat_template=config.text.chat_template)
        prompts = read(format_of(config.text, tokenizer)).rows
        found = rollouts.roll_out(
            options,
            prompts,
            tokenizer,
            run=config.run,
            out=out,
            stage="calibrate",
            max_length=config.max_length,
            text=config.text,
            mesh=config.mesh,
        )
        rewards = np.asarray([row.reward for row in found], np.float32).reshape(-1, options.samples)
        about = tables.made_with(
            options.base,
            options.reward,
            tokenizer,
            [prompt.tokens for prompt in prompts],
            max_new_tokens=options.max_new_tokens,
            dtype=config.run.dtype,
        ) | {"seed": config.run.seed}
        tables.write(out, tables.Table(rewards, about))
        spread = np.sort(rewards, axis=1)
        ties = (np.diff(spread, axis=1) == 0).mean()
        done = {
            "prompts": len(rewards),
            "samples": options.samples,
            "reward": float(rewards.mean()),
            "spread_of_prompt_means": float(rewards.mean(axis=1).std()),
            "mean_spread_within_prompts": float(rewards.std(axis=1).mean()),
            "tied_neighbours": float(ties),
        }
        _io.write_json(out / "summary.json", done)
    job.report(out, done, following, product=tables.REWARDS)
    return done


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

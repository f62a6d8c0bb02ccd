"""Make the calibration table of a reward: where a response's reward stands among the base's own for its prompt.

python -m train.calibrate --base DIR --prompts FILE --reward REWARD --samples 100 --out runs/table

Draws K responses of the base for each prompt, once, in shards from which an interrupted job goes on, and keeps their
sorted rewards (InfAlign, arXiv 2412.19792, eq. 12). train.rl --calibration reads the table; it is refused for another
model, reward, tokenizer, template, limit or set of prompts than those that made it. Small K blur the top: with K
samples, nothing above the best of K is told apart.
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import numpy as np

from jaxalign import _io, commands, models
from jaxalign.training import job, reading, rollouts, tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rollouts.Source):
    """Options of train.calibrate."""

    out: str
    """Folder: table.npz, table.json, rollouts/, summary.json, config.json."""
    samples: int = 100
    """Responses of the base per prompt, K; 32 at least for transforms that stress a tail."""
    decode_batch: int = 512
    """Roll-outs decoded together, whole prompts."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def run(config: Config) -> dict[str, Any]:
    """Makes the table, gives the run's summary."""
    if config.text.show:
        return reading.show(config, "prompts", model=config.base)
    rollouts.check_source(config)
    if config.samples < 2:
        raise ValueError(f"samples: expected at least 2 responses to rank among, found {config.samples}")
    out = _io.open_run(config.out, config, inputs=rollouts.inputs(config))
    following = f"python -m train.rl --model {config.base} --prompts {config.prompts} --reward "
    following += f"{shlex.quote(config.reward)} "
    following += f"--calibration {out} --max-new-tokens {config.max_new_tokens} --transform exp:10 --out DIR"
    done = job.finished(out)
    if done is None:
        tokenizer = models.tokenizer(config.base, chat_template=config.text.chat_template)
        found = rollouts.roll_out(config, out, tokenizer, stage="calibrate")
        rewards = np.asarray([row.reward for row in found], np.float32).reshape(-1, config.samples)
        asked = [prompt.tokens for prompt in rollouts.read_prompts(config, tokenizer)]
        about = tables.made_with(
            config.base,
            config.reward,
            tokenizer,
            asked,
            max_new_tokens=config.max_new_tokens,
            dtype=config.dtype,
        ) | {"seed": config.seed}
        tables.write(out, tables.Table(rewards, about))
        spread = np.sort(rewards, axis=1)
        ties = (np.diff(spread, axis=1) == 0).mean()
        done = {
            "prompts": len(rewards),
            "samples": config.samples,
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

"""Align a language model with a reward by KL-regularised policy gradients:

python -m train.rl --model DIR --prompts FILE --reward REWARD --beta 0.1 --out runs/rl

Maximises E[r] - beta KL(pi || pi_ref) over the model's own responses; pi_ref is the model that the run starts from,
kept beside, or the weights under the adapter with --lora-rank. The reward may be calibrated against the base's own
samples and transformed for the decoder that will be used (InfAlign: --calibration, --transform), and shaped by a
threshold (Stackelberg: --bound). rloo (arXiv 2402.14740), grpo (arXiv 2402.03300) and ppo (arXiv 1707.06347).

summary.json holds the reward and the KL to the reference on held-out prompts, before and after.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxalign import commands, models, rewards
from jaxalign.data import encoded
from jaxalign.data.text_options import TextOptions, ending_ids, format_of
from jaxalign.prompts import bucket
from jaxalign.training import adapters, reading, rl, rl_rewards
from jaxalign.training.options import (
    AdapterOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RowOptions,
    RunOptions,
)
from jaxalign.training.rl_options import RewardOptions, RLOptions, check_reward_options, check_rl_options
from jaxalign.training.training_job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.rl."""

    run: RunOptions
    prompts: str
    """Prompts: files, folders or a data set's name, of any form (docs/data.md)."""
    reward: RewardOptions
    rl: RLOptions = dataclasses.field(default_factory=RLOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    rows: RowOptions = dataclasses.field(default_factory=functools.partial(RowOptions, validation=0.1))
    optimizer: OptimizerOptions = dataclasses.field(
        default_factory=functools.partial(OptimizerOptions, batch_size=16, learning_rate=1e-5)
    )
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    adapters: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    room = config.rows.max_length - config.rl.max_new_tokens
    read = functools.partial(reading.read_prompts, config.prompts, text=config.text, room=room)
    if config.text.show:
        return reading.show(read, config.text, model=config.model.model, tokenizer=config.model.tokenizer)
    size, accumulate, limit = config.optimizer.batch_size, config.mesh.accumulate, config.rl.max_new_tokens
    check_reward_options(config.reward)
    spec = adapters.spec_of(config.adapters)
    job = Job.open(
        config,
        stage="rl",
        inputs=[config.prompts, *rl_rewards.inputs(config.reward)],
        following=lambda out: (
            f"python -m eval.decode --model {config.model.model or 'BASE'} --reward REWARD --prompts FILE "
            f"--method policy:{out / 'model'} --out DIR"
        ),
        beside=rewards.reward_roles(config.reward.reward),
        rows_per_step=check_rl_options(config.rl, batch_size=size, accumulate=accumulate),
    )
    done = job.finished()
    if done is not None:
        return done
    started = job.start(rl.head_of(config.rl, config.model.model), trained=spec is None)
    prompts = read(format_of(config.text, started.tokenizer)).rows
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest + limit > config.rows.max_length:
        raise ValueError(
            f"max_length: expected at least the longest prompt's {longest} and {limit} new tokens, "
            f"found {config.rows.max_length}"
        )
    ends = ending_ids(config.text, started.tokenizer, started.lm.eos_ids, [prompt.source for prompt in prompts])
    started = started._replace(lm=models.with_eos(started.lm, ends))
    data = job.split(encoded.Loaded([rl.PromptRow(prompt.tokens, i) for i, prompt in enumerate(prompts)], 0, []))
    base = config.model.model or config.model.architecture
    reward = rl_rewards.compose(
        config.reward, started, prompts, base=base, dtype=config.run.dtype, max_new_tokens=limit, text=config.text
    )
    learner, trained, frozen = rl.learner_of(
        config.rl,
        started,
        reward,
        seed=config.run.seed,
        spec=spec,
        accumulate=accumulate,
        target_kl=config.reward.target_kl,
    )
    pad = functools.partial(rl.collate_prompts, length=bucket(longest), count=len(prompts))
    before = rl.measure_policy(learner, trained, frozen, data.validation, pad, batch_size=size)
    options: dict[str, Any] = {"optimizer": config.optimizer, "mesh": config.mesh, "out": job.out}
    state = rl.train_policy(learner, trained, frozen, data.train, pad, beta=config.reward.beta, **options)
    after = rl.measure_policy(learner, state.train.params, frozen, data.validation, pad, batch_size=size)
    summary: dict[str, Any] = {f"{name}_before": value for name, value in before.items() if "kl" not in name} | after
    summary |= {"beta": float(state.beta), "dropped_iterations": int(state.dropped[0])}
    final = rl.trained_policy(started, state, spec, base=config.model.model, out=job.out)
    return job.finish(started._replace(lm=models.with_head(started.lm, None)), final, data, summary)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

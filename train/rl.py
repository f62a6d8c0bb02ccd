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

import jax

from jaxalign import _io, commands, models
from jaxalign.data import encoded
from jaxalign.prompts import bucket
from jaxalign.training import adapters, job, reading, rl, rl_rewards, rollouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rl.RLOptions):
    """Options of train.rl."""


def run(config: Config) -> dict[str, Any]:
    """Trains, writes the run folder, gives its summary."""
    if config.text.show:
        return reading.show(config, "prompts", model=config.model)
    rl.check_rl_options(config)
    inputs = [config.prompts, config.model, config.architecture, config.tokenizer, *rl_rewards.inputs(config)]
    read = [folder for name in inputs for folder in models.source_folders(name)]
    out = _io.open_run(config.out, config, inputs=read)
    following = (
        f"python -m eval.decode --model {config.model or 'BASE'} --reward REWARD --prompts FILE "
        f"--method policy:{out / 'model'} --out DIR"
    )
    done = job.finished(out)
    if done is not None:
        job.report(out, done, following)
        return done
    head = models.Head("value", hidden_size=64) if config.algorithm == "ppo" else None
    begin = job.start(config, lambda _: head)
    prompts = rollouts.read_prompts(config, begin.tokenizer)
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest + config.max_new_tokens > config.max_length:
        raise ValueError(
            f"max_length: expected at least the longest prompt's {longest} and {config.max_new_tokens} new tokens, "
            f"found {config.max_length}"
        )
    rows = [rl.PromptRow(prompt.tokens, i) for i, prompt in enumerate(prompts)]
    held = job.split(encoded.Loaded(rows, 0, []), config)
    learner, trained, frozen = rl.learner_of(config, begin, rl_rewards.build(config, begin, prompts))
    pad = functools.partial(rl.collate_prompts, length=bucket(longest), count=len(prompts))
    before = rl.measure_policy(learner, trained, frozen, held.validation, pad)
    state = rl.train_policy(config, learner, trained, frozen, held.train, out, pad)
    after = rl.measure_policy(learner, state.train.params, frozen, held.validation, pad)
    summary: dict[str, Any] = {f"{name}_before": value for name, value in before.items() if "kl" not in name} | after
    summary |= {"beta": float(state.beta), "dropped_iterations": int(state.dropped[0])}
    lm = models.with_head(begin.lm, None)
    if adapters.spec_of(config) is None:
        final = jax.device_get({"transformer": state.train.params["transformer"]})
    else:
        # Into the float32 weights: the reference may be held in bfloat16.
        masters, adapter = {"transformer": begin.params["transformer"]}, jax.device_get(state.train.params["adapter"])
        final = adapters.merged(config, models.LanguageModel(lm.config), masters, adapter, out)
    return job.finish(out, begin._replace(lm=lm), final, held, summary, following)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

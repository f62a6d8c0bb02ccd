"""python -m eval.bench ggro: gradient-guided decoding of a batch of prompts against one prompt at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, decoding, models, policies, rewards
from jaxalign.types import TokenBatch

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench ggro."""

    batch: tuple[int, ...] = (16,)
    """Batch sizes, one or several [prompts]."""
    candidates: int = 4
    """Forms of each segment, at most."""
    k: int = 25
    """Tokens that may be forced."""
    segment: int = 12
    """About the mean length of a segment [tokens]: the threshold is the entropy that one greedy token in so many
    exceeds."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 32
    """New tokens per prompt; no row stops early."""
    repeats: int = 3
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of both models."""
    width: int = 512
    """Width of both models, a multiple of 64; heads of 64."""


def run(config: Config) -> list[dict[str, Any]]:
    """Seconds per prompt of GGRO with a reward model of the base's size: all prompts in one call, and the same prompts
    one call each; speed = the second over the first. Rows wait for each other's longest form."""
    mesh = common.check(config, config.batch)
    shape = common.config(layers=config.layers, width=config.width)
    lm, params = common.build(0, shape, config.dtype)
    judge, judge_params = common.build(1, dataclasses.replace(shape, head=models.Head("reward")), config.dtype)
    # Logits of random weights are nearly uniform, and of nearly one entropy: spread them as a trained model's are.
    params["transformer"]["lm_head"] = 12 * params["transformer"]["lm_head"]
    params, judge_params = common.place((params, judge_params), mesh)
    policy, gain = policies.language_model(lm), rewards.token_gradient(judge)
    rows = []
    for size in config.batch:
        batch = common.prompts(size, config.prompt)
        inputs = common.share(batch, mesh)
        singles = [TokenBatch(batch.tokens[i : i + 1], batch.mask[i : i + 1], jnp.array([i])) for i in range(size)]
        threshold = _threshold(lm, params, batch, config)

        def decode(prompts: Any, threshold: Any = threshold) -> decoding.GGROInfo:
            found = decoding.ggro(
                policy,
                None,
                gain,
                {"policy": params, "reward": judge_params, "entropy_threshold": threshold},
                jax.random.key(1),
                prompts,
                num_samples=config.candidates,
                max_new_tokens=config.new,
                eos_ids=(),
                top_k=min(config.k, lm.vocab_size),
            )
            info: decoding.GGROInfo = jax.block_until_ready(found).info
            return info

        def together(inputs: Any = inputs, decode: Any = decode) -> None:
            decode(inputs)

        def alone(singles: Any = singles, decode: Any = decode) -> None:
            for prompt in singles:
                decode(prompt)

        runs: dict[str, Callable[[], Any]] = {"batch": together, "alone": alone}
        seconds = common.alternate(runs, repeats=config.repeats)
        found = decode(inputs)
        row: dict[str, Any] = {"batch": size} | {f"{name} s/prompt": s / size for name, s in seconds.items()}
        row["speed"] = seconds["alone"] / seconds["batch"]
        means = {"segments": found.segments, "tokens": found.policy_steps}
        means |= {"scored": found.reward_passes, "gradients": found.gradient_passes}
        rows.append(row | {name: float(np.mean(value)) for name, value in means.items()})
    common.report("ggro", rows, config.out)
    return rows


def _threshold(lm: models.LanguageModel, params: Any, batch: TokenBatch, config: Config) -> jax.Array:
    """The entropy that one in `segment` positions of the prompts exceeds."""
    logits = lm.logits(params, lm.hidden(params, batch.tokens))
    log_prob = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_prob) * log_prob).sum(axis=-1)
    return jnp.quantile(entropy, 1 - 1 / config.segment)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

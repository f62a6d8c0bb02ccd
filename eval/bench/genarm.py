"""python -m eval.bench genarm: the cost of one autoregressive reward, a model of the base's size or its adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import commands, critics, decoding, models, policies

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench genarm."""

    batch: tuple[int, ...] = (1, 8, 32)
    """Batch sizes, one or several [prompts]."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 64
    """New tokens per prompt; no row stops early."""
    repeats: int = 7
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of both models."""
    width: int = 512
    """Width of both models, a multiple of 64; heads of 64."""
    rank: int = 8
    """Rank of the adapter, on every projection."""


def run(config: Config) -> list[dict[str, Any]]:
    """Tokens/s of the base, of the base under one autoregressive reward model, and under one that is an adapter of it;
    cost = their times over the base's."""
    mesh = common.check(config, config.batch)
    shape = common.config(layers=config.layers, width=config.width)
    lm, params = common.build(0, shape, config.dtype)
    arm, arm_params = common.build(1, shape, config.dtype)
    params, arm_params = common.place((params, arm_params), mesh)
    base = policies.language_model(lm)
    guided = policies.tilt(base, critics.genarm(arm))
    arguments = {"policy": params, "critic": arm_params, "beta": jnp.asarray(1.0)}
    fused = policies.adapters(lm, 1)
    spec = models.Lora(config.rank)
    adapter = jax.tree.map(lambda x: x + 0.01, models.lora.init(jax.random.key(2), lm, spec))
    stacked = common.place(models.lora.stack([adapter], [spec]), mesh)
    shared = {"policy": params, "adapters": stacked, "weights": jnp.ones(1)}
    rows = []
    for size in config.batch:
        inputs = common.share(common.prompts(size, config.prompt), mesh)

        def draw(policy: Any, values: Any, inputs: Any = inputs) -> None:
            drawn = decoding.sample(policy, values, jax.random.key(1), inputs, max_new_tokens=config.new, eos_ids=())
            jax.block_until_ready(drawn)

        runs = {
            "base": lambda: draw(base, params),
            "genarm": lambda: draw(guided, arguments),
            "adapter": lambda: draw(fused, shared),
        }
        seconds = common.alternate(runs, repeats=config.repeats)
        row = {"batch": size} | {f"{name} tokens/s": size * config.new / s for name, s in seconds.items()}
        costs = {"cost": seconds["genarm"] / seconds["base"], "adapter cost": seconds["adapter"] / seconds["base"]}
        rows.append(row | costs)
    common.report("genarm", rows, config.out)
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

"""python -m eval.bench genarm: the cost of one autoregressive reward model of the base's size, per token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eval.bench import common
from jaxalign import critics, decoding, policies


def main(
    batch: tuple[int, ...] = (1, 8, 32),
    prompt: int = 32,
    new: int = 64,
    repeats: int = 7,
    layers: int = 8,
    width: int = 512,
    dtype: str = "float32",
    out: str | None = None,
) -> list[dict[str, Any]]:
    """Tokens/s of the base and of the base under one autoregressive reward model; cost = time of the second over the
    first.

    Args:
        batch: Batch sizes [prompts].
        prompt: Prompt length [tokens].
        new: New tokens per prompt.
        repeats: Timed runs of each side, alternating; the median is printed.
        layers: Layers of both models.
        width: Width of both models (heads of 64).
        dtype: Type of the weights.
        out: Folder for genarm.json.
    """
    lm, params = common.build(0, common.config(layers=layers, width=width), dtype)
    arm, arm_params = common.build(1, common.config(layers=layers, width=width), dtype)
    base = policies.language_model(lm)
    guided = policies.tilt(base, critics.autoregressive(arm))
    arguments = {"policy": params, "critic": arm_params, "beta": jnp.asarray(1.0)}
    rows = []
    for size in batch:
        inputs = common.prompts(size, prompt)

        def run(policy: Any, values: Any, inputs: Any = inputs) -> None:
            drawn = decoding.sample(policy, values, jax.random.key(1), inputs, max_new_tokens=new, eos_ids=())
            jax.block_until_ready(drawn)

        seconds = common.alternate(
            {"base": lambda: run(base, params), "genarm": lambda: run(guided, arguments)}, repeats=repeats
        )
        row = {"batch": size} | {f"{name} tokens/s": size * new / s for name, s in seconds.items()}
        rows.append(row | {"cost": seconds["genarm"] / seconds["base"]})
    common.report("genarm", rows, out)
    return rows

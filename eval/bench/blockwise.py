"""python -m eval.bench blockwise: K candidate blocks together against the same candidates one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxalign import commands, critics, decoding, models, policies

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench blockwise."""

    batch: tuple[int, ...] = (1,)
    """Batch sizes, one or several [prompts]."""
    candidates: int = 8
    """Candidate blocks per prompt."""
    block: int = 16
    """Length of a block [tokens]."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 64
    """New tokens per prompt; no row stops early."""
    repeats: int = 5
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of the policy and of the scorer."""
    width: int = 512
    """Width of both, a multiple of 64; heads of 64."""


def run(config: Config) -> list[dict[str, Any]]:
    """Kept tokens/s of blockwise decoding with a scorer of the base's size, and of as many runs as there are candidates
    that draw and score one block at a time: the same tokens drawn, none of the batch's gain."""
    mesh = common.check(config, config.batch)
    base = common.config(layers=config.layers, width=config.width)
    lm, params = common.build(0, base, config.dtype)
    scorer, values = common.build(1, dataclasses.replace(base, head=models.Head("value")), config.dtype)
    policy, critic = policies.language_model(lm), critics.value(scorer)
    both = common.place({"policy": params, "critic": values}, mesh)
    rows = []
    for size in config.batch:
        inputs = common.share(common.prompts(size, config.prompt), mesh)

        def draw(candidates: int, seed: int, inputs: Any = inputs) -> None:
            drawn = decoding.blockwise(
                policy,
                critic,
                both,
                jax.random.key(seed),
                inputs,
                num_samples=candidates,
                block_size=config.block,
                max_new_tokens=config.new,
                eos_ids=(),
            )
            jax.block_until_ready(drawn)

        def one_by_one() -> None:
            for seed in range(config.candidates):
                draw(1, seed)

        seconds = common.alternate(
            {
                "together": lambda: draw(config.candidates, 0),
                "one by one": one_by_one,
            },
            repeats=config.repeats,
        )
        row: dict[str, Any] = {"batch": size, "candidates": config.candidates, "block": config.block}
        row |= {f"{name} tokens/s": size * config.new / s for name, s in seconds.items()}
        rows.append(row | {"ratio": seconds["one by one"] / seconds["together"]})
    common.report("blockwise", rows, config.out)
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

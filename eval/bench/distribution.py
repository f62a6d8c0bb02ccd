"""python -m eval.bench distribution: a tilt by a Q head of laws of the reward beside one by a Q head of values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, critics, decoding, models, policies
from jaxalign.critics import reads

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench distribution."""

    batch: tuple[int, ...] = (1, 8, 32)
    """Batch sizes, one or several [prompts]."""
    k: tuple[int, ...] = (0, 40)
    """Candidates per token, one or several; 0: the whole vocabulary."""
    support: int = 32
    """Points of the law's support, at least 2."""
    rank: int = 2
    """Entries of a token in the head of laws."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 64
    """New tokens per prompt; no row stops early."""
    repeats: int = 7
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of base and critics."""
    width: int = 512
    """Width of base and critics, a multiple of 64; heads of 64."""


def run(config: Config) -> list[dict[str, Any]]:
    """Tokens/s of the base, of its tilt by a Q head (controlled decoding) and by a Q head of laws read at one beta
    (`critics.reads.soft`), both models of the base's size; ratio = the time with laws over the time with values."""
    mesh = common.check(config, config.batch)
    if config.support < 2 or min(config.k, default=-1) < 0:
        raise ValueError(f"support, k: expected at least 2 and 0, found {config.support}, {config.k}")
    base, params = common.build(0, common.config(layers=config.layers, width=config.width), config.dtype)
    points = tuple(float(x) for x in np.linspace(-1, 1, config.support))
    laws = models.Head("q", distribution=models.Distribution(points, rank=config.rank))
    shapes = (common.config(layers=config.layers, width=config.width, head=head) for head in (models.Head("q"), laws))
    (value_lm, value_params), (law_lm, law_params) = (common.build(1, shape, config.dtype) for shape in shapes)
    params, value_params, law_params = common.place((params, value_params, law_params), mesh)
    policy, beta = policies.language_model(base), jnp.asarray(1.0)
    by_value = {"policy": params, "critic": value_params, "beta": beta}
    by_laws = {"policy": params, "critic": {"head": law_params, "read": {"beta": beta}}, "beta": beta}
    rows = []
    for size in config.batch:
        inputs = common.share(common.prompts(size, config.prompt), mesh)
        for k in config.k:
            valued = policies.tilt(policy, critics.value(value_lm), top_k=k or None)
            read = policies.tilt(policy, critics.distribution(law_lm, reads.soft()), top_k=k or None)

            def draw(policy: Any, values: Any, inputs: Any = inputs) -> None:
                drawn = decoding.sample(
                    policy, values, jax.random.key(1), inputs, max_new_tokens=config.new, eos_ids=()
                )
                jax.block_until_ready(drawn)

            runs: dict[str, Callable[[], None]] = {
                "base": functools.partial(draw, policy, params),
                "values": functools.partial(draw, valued, by_value),
                "laws": functools.partial(draw, read, by_laws),
            }
            seconds = common.alternate(runs, repeats=config.repeats)
            row = {"batch": size, "k": k} | {f"{name} tokens/s": size * config.new / s for name, s in seconds.items()}
            rows.append(row | {"ratio": seconds["laws"] / seconds["values"]})
    common.report("distribution", rows, config.out)
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

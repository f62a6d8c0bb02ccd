"""python -m eval.bench deterministic: sampling in chunks, the same at any batch size, beside plain sampling.

Chunks read the weights once each: the cost is near 1 where a chunk keeps the device busy, and up to the number of
chunks where reading the weights takes the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import commands, decoding, policies
from jaxalign.types import TokenBatch

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench deterministic."""

    batch: tuple[int, ...] = (32,)
    """Batch sizes, one or several [prompts]."""
    chunk: tuple[int, ...] = (8,)
    """G, rows of a chunk, one or several."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 64
    """New tokens per prompt; no row stops early."""
    repeats: int = 5
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of the model."""
    width: int = 512
    """Width of the model, a multiple of 64; heads of 64."""
    vocab: int = common.VOCAB
    """Vocabulary [tokens]."""


def run(config: Config) -> list[dict[str, Any]]:
    """Tokens/s of plain and of deterministic sampling, and the time of the second in that of the first: "cost"; the
    same of scoring in one pass: "score cost"."""
    mesh = common.check(config, config.batch)
    shape = common.config(layers=config.layers, width=config.width, vocab=config.vocab)
    lm, params = common.build(0, shape, config.dtype)
    policy, rng = policies.language_model(lm), jax.random.key(1)
    params = common.place(params, mesh)

    def sample(prompts: TokenBatch, chunk: int | None) -> Callable[[], Any]:
        limits: dict[str, Any] = {"max_new_tokens": config.new, "eos_ids": (), "deterministic": chunk}
        return lambda: jax.block_until_ready(decoding.sample(policy, params, rng, prompts, **limits))

    def score(prompts: TokenBatch, chunk: int | None) -> Callable[[], Any]:
        tokens = jax.random.randint(rng, (prompts.tokens.shape[0], config.new), 1, config.vocab)
        mask = jnp.ones(tokens.shape, bool)
        return lambda: jax.block_until_ready(
            decoding.log_prob(policy, params, rng, prompts, tokens, mask, deterministic=chunk)
        )

    rows = []
    for size in config.batch:
        prompts = common.share(common.prompts(size, config.prompt, vocab=config.vocab), mesh)
        for chunk in config.chunk:
            runs = {"plain": sample(prompts, None), "deterministic": sample(prompts, chunk)}
            runs |= {"plain score": score(prompts, None), "score": score(prompts, chunk)}
            seconds = common.alternate(runs, repeats=config.repeats)
            speeds = {f"{name} tokens/s": size * config.new / seconds[name] for name in ("plain", "deterministic")}
            costs = {"cost": seconds["deterministic"] / seconds["plain"]}
            costs["score cost"] = seconds["score"] / seconds["plain score"]
            rows.append({"batch": size, "G": chunk} | speeds | costs)
    common.report("deterministic", rows, config.out)
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

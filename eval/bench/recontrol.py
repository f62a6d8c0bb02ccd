"""python -m eval.bench recontrol: the cost of editing hidden states by gradient ascent on a value network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import commands, decoding, models, policies
from jaxalign.types import Policy, TokenBatch

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench recontrol."""

    batch: tuple[int, ...] = (1, 8, 32)
    """Batch sizes, one or several [prompts]."""
    steps: int = 30
    """Steps of ascent per token."""
    times: tuple[int, ...] = (1, 4)
    """Widths of the value network's hidden layer, in widths of the model."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 64
    """New tokens per prompt; no row stops early."""
    repeats: int = 7
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of the model."""
    width: int = 512
    """Width of the model, a multiple of 64; heads of 64."""


def run(config: Config) -> list[dict[str, Any]]:
    """Seconds per token of the base, of the edited base, and of `steps` bare passes of the value network, forward and
    gradient of its input; cost = edited over base, overhead = edited over (base + bare passes)."""
    mesh = common.check(config, config.batch)
    if not config.times or min(config.times) < 1:
        raise ValueError(f"times: expected widths of at least 1, found {config.times}")
    lm, params = common.build(0, common.config(layers=config.layers, width=config.width), config.dtype)
    params = common.place(params, mesh)
    base = policies.language_model(lm)
    rows = []
    for times in config.times:
        value_lm = models.with_head(lm, models.Head("value", hidden_size=times * config.width, activation="relu"))
        value_params = common.place({"head": value_lm.init_head(jax.random.key(1))}, mesh)
        value = policies.head_value(value_lm)
        edited = policies.re_control(base, lm.logits, value, num_steps=config.steps)
        arguments = {"policy": params, "value": value_params, "step_size": jnp.asarray(0.5)}
        passes = _passes(value, config.steps * config.new)
        for size in config.batch:
            inputs = common.share(common.prompts(size, config.prompt), mesh)
            hidden = common.share(jax.random.normal(jax.random.key(2), (size, config.width)), mesh)
            runs: dict[str, Callable[[], Any]] = {
                "base": functools.partial(_draw, base, params, inputs, config.new),
                "edited": functools.partial(_draw, edited, arguments, inputs, config.new),
                "bare": functools.partial(passes, value_params, hidden),
            }
            seconds = common.alternate(runs, repeats=config.repeats)
            row: dict[str, Any] = {"batch": size, "value width": times * config.width}
            row |= {f"{name} ms/token": 1e3 * s / config.new for name, s in seconds.items()}
            row["cost"] = seconds["edited"] / seconds["base"]
            rows.append(row | {"overhead": seconds["edited"] / (seconds["base"] + seconds["bare"])})
    common.report("recontrol", rows, config.out)
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


def _draw(policy: Policy, params: Any, inputs: TokenBatch, new: int) -> None:
    drawn = decoding.sample(policy, params, jax.random.key(1), inputs, max_new_tokens=new, eos_ids=())
    jax.block_until_ready(drawn)


def _passes(value: Any, count: int) -> Callable[[Any, Any], None]:
    """`count` times the forward pass of the value network and the gradient of its input."""

    @jax.jit
    def passes(weights: Any, hidden: Any) -> Any:
        gradient = jax.grad(lambda h: value(weights, h).sum())
        # Each pass needs the one before, so that none is left out.
        return jax.lax.fori_loop(0, count, lambda _, h: h + gradient(h), hidden)

    return lambda weights, hidden: jax.block_until_ready(passes(weights, hidden))

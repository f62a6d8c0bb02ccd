"""python -m eval.bench distribution: a Q head of laws of the reward beside one of values, in training and decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, critics, decoding, models, policies, training
from jaxalign.critics import reads
from jaxalign.training import laws, objectives, values

from . import common
from .train import stepper


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench distribution."""

    batch: tuple[int, ...] = (1, 8)
    """Batch sizes of decoding, one or several [prompts]."""
    k: tuple[int, ...] = (40, 0)
    """Candidates per token, one or several; 0: the whole vocabulary."""
    rows: int = 8
    """Rows of a training step."""
    length: int = 128
    """Length of a row, at least 2 [tokens]; no row is padded."""
    support: int = 49
    """Points of the law's support, at least 2."""
    rank: int = 2
    """In how many ways a token moves the law."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 32
    """New tokens per prompt; no row stops early."""
    repeats: int = 5
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of base and critics."""
    width: int = 512
    """Width of base, critics and their heads' hidden layer, a multiple of 64; heads of attention of 64."""


def run(config: Config) -> list[dict[str, Any]]:
    """Milliseconds of a training step (loss, gradient, clipping, AdamW) by `objectives.value` of fudge and by
    `laws.laws`, and of a token of the base's tilt by each head (laws read by `critics.reads.soft`); ratio: laws over
    values. Base and critics are of one size; the heads' hidden layer is that of train.value."""
    mesh = common.check(config, (*config.batch, config.rows))
    if config.support < 2 or min(config.k, default=-1) < 0 or config.length < 2:
        raise ValueError(
            f"length, support, k: expected at least 2, 2 and 0, found {config.length}, {config.support}, {config.k}"
        )
    points = tuple(np.linspace(-1, 1, config.support).tolist())
    plain = models.Head("q", hidden_size=config.width)
    of_laws = dataclasses.replace(plain, distribution=models.Distribution(points, rank=config.rank))
    shape = common.config(layers=config.layers, width=config.width)
    shapes = {name: dataclasses.replace(shape, head=head) for name, head in (("values", plain), ("laws", of_laws))}
    built = {name: common.build(1, each, config.dtype) for name, each in shapes.items()}
    rows = [_row("training", config.rows, common.alternate(_steps(config, shapes, mesh), repeats=config.repeats))]
    base, params = common.build(0, shape, config.dtype)
    params, own, law_params = common.place((params, built["values"][1], built["laws"][1]), mesh)
    beta, policy = jnp.asarray(1.0), policies.language_model(base)
    soft = critics.DistributionParams(law_params, {"beta": beta})
    tilts: dict[str, tuple[Any, Any]] = {
        "values": (critics.value(built["values"][0]), own),
        "laws": (critics.distribution(built["laws"][0], reads.soft()), soft),
    }
    for size in config.batch:
        inputs = common.share(common.prompts(size, config.prompt), mesh)
        for k in config.k:

            def draw(critic: Any, own: Any, inputs: Any = inputs, k: int = k) -> None:
                tilted = policies.tilt(policy, critic, top_k=k or None)
                given = {"policy": params, "critic": own, "beta": beta}
                jax.block_until_ready(
                    decoding.sample(tilted, given, jax.random.key(1), inputs, max_new_tokens=config.new, eos_ids=())
                )

            draws: dict[str, Callable[[], None]] = {
                name: functools.partial(draw, *tilt) for name, tilt in tilts.items()
            }
            seconds = common.alternate(draws, repeats=config.repeats)
            what = f"decoding, {k} candidates" if k else "decoding, vocabulary"
            rows.append(_row(what, size, {name: x / config.new for name, x in seconds.items()}))
    common.report("distribution", rows, config.out)
    return rows


def _row(what: str, batch: int, seconds: dict[str, float]) -> dict[str, Any]:
    times: dict[str, Any] = {f"{name} ms": 1000 * x for name, x in seconds.items()}
    return {"what": what, "batch": batch, **times, "ratio": seconds["laws"] / seconds["values"]}


def _steps(config: Config, shapes: dict[str, models.Config], mesh: Any) -> dict[str, Callable[[], float]]:
    """One more optimizer step of each head and its body at each call, as train.value takes it."""
    tokens = common.prompts(config.rows, config.length).tokens
    real, reward = jnp.ones(tokens.shape, bool), jnp.linspace(-1, 1, config.rows)
    response = real.at[:, : config.length // 2].set(False)
    batch: Any = {"tokens": tokens, "mask": real, "loss_mask": response, "reward": reward}
    batch = jax.tree.map(lambda x: x[None], common.share(batch, mesh))
    optimizer, schedule = training.adamw(learning_rate=1e-4, steps=config.repeats + 1, clip=1.0)
    runs = {}
    for name, shape in shapes.items():
        lm = models.LanguageModel(shape, config.dtype)
        loss = laws.laws(lm) if name == "laws" else objectives.value(lm, "fudge")
        params, loss = values.without_lm_head(loss, models.LanguageModel(shape).init(jax.random.key(1)))
        state = common.place(training.create(params, optimizer), mesh)
        step: Any = training.train_step(loss, optimizer, schedule=schedule, donate=True)
        runs[name] = stepper(step.lower(state, batch, None).compile(), state, batch)
    return runs


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

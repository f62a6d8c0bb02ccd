"""python -m eval.bench score: log-probabilities of given tokens in chunks, against log-softmax over all logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVarTuple, Unpack

import jax
import jax.numpy as jnp

from jaxalign import commands, models
from jaxalign.types import Array, Params

from . import common

TOLERANCE = 1e-4  # nats, float32

Arguments = TypeVarTuple("Arguments")


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench score."""

    batch: int = 64
    """Sequences."""
    length: int = 256
    """Length of a sequence, at least 2 [tokens]."""
    vocab: int = 32000
    """Vocabulary of the model [tokens]."""
    chunk: int | None = None
    """Positions whose logits are alive together in ours; by default those of 2,048 tokens, 64 at most."""
    repeats: int = 3
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 2
    """Layers of the model."""
    width: int = 512
    """Width of the model, a multiple of 64; heads of 64."""


def run(config: Config) -> list[dict[str, Any]]:
    """Seconds and peak memory of log pi(token) of every token but the first, and of the gradient of their mean.

    Both sides are one jitted function each, the model's forward pass included. The alternative keeps log-softmax over
    [B,L,V] and picks the tokens. The memory is the compiler's plan for one device: temp is its buffers, total those
    with the arguments and the results; model temp is that of the hidden states alone (and their gradient), which both
    sides need. A GPU's measured peak is left out: it never falls within a process, and compiling moves it too, so the
    two sides cannot be told apart.

    RuntimeError: the two sides differ by more than 1e-4 in float32.
    """
    mesh = common.check(config, (config.batch,))
    if config.length < 2 or config.vocab < 2:
        raise ValueError(f"length, vocab: expected at least 2, found {config.length} and {config.vocab}")
    shape = common.config(layers=config.layers, width=config.width, vocab=config.vocab, length=config.length)
    lm, params = common.build(0, shape, config.dtype)
    params = common.place(params, mesh)
    inputs = common.prompts(config.batch, config.length, vocab=config.vocab)
    tokens = common.share(inputs.tokens, mesh)

    def ours(params: Params, tokens: Array) -> Array:
        hidden = lm.hidden(params, tokens)
        return models.token_log_prob(lm, params, hidden[:, :-1], tokens[:, 1:], chunk=config.chunk)

    def whole(params: Params, tokens: Array) -> Array:
        log_prob = jax.nn.log_softmax(lm.logits(params, lm.hidden(params, tokens)[:, :-1]), axis=-1)
        return jnp.take_along_axis(log_prob, tokens[:, 1:, None], axis=-1)[..., 0]

    passes: dict[str, Callable[[Any], Any]] = {"forward": lambda f: f, "gradient": _mean_and_gradient}
    rows = []
    for name, change in passes.items():
        compiled = {
            side: jax.jit(change(f)).lower(params, tokens).compile()
            for side, f in (("jaxalign", ours), ("log_softmax", whole))
        }
        model = jax.jit(change(lm.hidden)).lower(params, tokens).compile()
        found, expected = (f(params, tokens) for f in compiled.values())
        difference = max(float(x) for x in jax.tree.leaves(jax.tree.map(_difference, found, expected)))
        # Before the timing: a wrong result has no speed. A NaN fails as well.
        if config.dtype == "float32" and not difference <= TOLERANCE:
            raise RuntimeError(f"score {name}: expected a difference of at most {TOLERANCE}, found {difference}")
        del found, expected
        seconds = common.alternate(
            {side: functools.partial(_wait, f, params, tokens) for side, f in compiled.items()},
            repeats=config.repeats,
            warmup=0,
        )
        temp, total = (
            {side: measure(f.memory_analysis()) / 1e6 for side, f in compiled.items()} for measure in (_temp, _total)
        )
        row: dict[str, Any] = {"pass": name} | {f"{side} s": value for side, value in seconds.items()}
        row["speed ratio"] = seconds["log_softmax"] / seconds["jaxalign"]
        for kind, sizes in (("temp", temp), ("total", total)):
            row |= {f"{side} {kind} MB": size for side, size in sizes.items()}
            row[f"{kind} ratio"] = sizes["jaxalign"] / sizes["log_softmax"]
        row["model temp MB"] = _temp(model.memory_analysis()) / 1e6
        rows.append(row | {"max difference": difference})
    common.report("score", rows, config.out)
    return rows


def _mean_and_gradient(f: Callable[[Params, Array], Array]) -> Callable[[Params, Array], Any]:
    return jax.value_and_grad(lambda params, tokens: f(params, tokens).mean())


def _wait(f: Callable[[Unpack[Arguments]], object], *args: *Arguments) -> None:
    jax.block_until_ready(f(*args))


def _difference(x: Array, y: Array) -> Array:
    return jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))


def _temp(memory: Any) -> int:
    return int(memory.temp_size_in_bytes)


def _total(memory: Any) -> int:
    return int(memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

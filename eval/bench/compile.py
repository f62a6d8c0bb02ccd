"""python -m eval.bench compile: CPU seconds to trace, lower and compile decoding and a training step.

The seconds are those of all threads, at several numbers of layers. The model is narrow, so that their number and not
their size decides. The step has its layers unrolled, as they are, and in a loop over stacked weights. Nothing runs: the
programs are made of shapes. A folder of compiled programs (--compilation-cache) makes the figures meaningless.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign import _io, commands, decoding, models, policies, training
from jaxalign.models.remat import rematerialised
from jaxalign.models.row_attention import RowMask
from jaxalign.models.transformer import OneLayer, real_position
from jaxalign.training import objectives
from jaxalign.types import Array, Params, TokenBatch

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench compile."""

    layers: tuple[int, ...] = (2, 8, 16, 32)
    """Numbers of layers."""
    width: int = 64
    """Width of the models; of a head 64."""
    vocab: int = 512
    """Tokens of the vocabulary."""
    length: int = 128
    """Tokens of a row, and of a prompt."""
    new: int = 32
    """Tokens of a response."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass of the training step keeps of each layer."""


def run(config: Config) -> list[dict[str, Any]]:
    """Compiles each program at each depth; prints and gives a row for each.

    Returns:
      Rows of program, layers, and what `timed` gives.
    """
    common.check(config, (1,))
    rows = []
    header = "| program | layers | trace [s] | lower [s] | compile [s] | in all [s] | instructions | temporaries [MB] |"
    print(f"{header}\n|---|---|---|---|---|---|---|---|", flush=True)
    for layers in config.layers:
        for name, (program, arguments) in _programs(config, layers).items():
            row = {"program": name, "layers": layers, **timed(program, *arguments)}
            rows.append(row)
            cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
            print(f"| {' | '.join(cells)} |", flush=True)
    if config.out:
        out = pathlib.Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        _io.write_json(out / "compile.json", rows)
    return rows


def timed(program: Any, *arguments: Any) -> dict[str, float | int]:
    """Compiles a jitted function.

    Args:
      program: as `jax.jit` gives it.
      arguments: arrays or their shapes.

    Returns:
      The CPU seconds of each phase and of all; the number of instructions of the compiled program, those of loops and
      other computations once each; its temporaries [MB].
    """
    times = [time.process_time()]
    traced = program.trace(*arguments)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    compiled = lowered.compile()
    times.append(time.process_time())
    phases = [b - a for a, b in itertools.pairwise(times)]
    count = len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.MULTILINE))
    found: dict[str, float | int] = dict(zip(("trace", "lower", "compile"), phases, strict=True))
    memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return found | {"all": sum(phases), "instructions": count, "temporaries": memory}


@dataclasses.dataclass(frozen=True)
class Scanned(models.LanguageModel):
    """A model of equal layers that whole rows pass through in a loop, over copies of the weights that are stacked
    inside the program: what is compared with layers that are unrolled."""

    def hidden(
        self,
        params: Params,
        tokens: Array,
        *,
        mask: Array | None = None,
        embeddings: Array | None = None,
        at: Array | None = None,
    ) -> Array:
        """The hidden states [B,L,D] of tokens [B,L]; neither embeddings nor columns may be given."""
        assert embeddings is None
        assert at is None
        body, real = params["transformer"], jnp.ones(tokens.shape, bool) if mask is None else mask
        rows = RowMask(real, real_position(real))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(body[f"layer_{i}"] for i in range(self.config.num_layers)))
        read = rematerialised(OneLayer(self.config, 0, jnp.dtype(self.dtype), self.mesh).read, self.remat)

        def layer(x: Array, weights: Params) -> tuple[Array, None]:
            return read({"params": {"layer_0": weights}}, x, rows, None)[0], None

        x, _ = jax.lax.scan(layer, self.embed(params, tokens), stacked)
        normed: Array = self._module.apply({"params": body}, x, method=lambda module, x: module.norm(x))
        return normed


def model_of(config: Config, layers: int) -> models.LanguageModel:
    """The narrow model of so many layers."""
    heads = max(config.width // 64, 1)
    sizes = models.Config(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=3 * config.width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        max_length=config.length + config.new,
        eos_ids=(0,),
    )
    return models.LanguageModel(sizes, config.dtype)


def _programs(config: Config, layers: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> (jitted function, shapes of its arguments)."""
    lm, rng = model_of(config, layers), jax.random.key(0)
    policy = policies.language_model(lm)

    def decode(params: Params, rng: Array, prompts: TokenBatch) -> Any:
        return decoding.sample(policy, params, rng, prompts, eos_ids=lm.eos_ids, max_new_tokens=config.new)

    def given() -> Any:
        tokens, real = jnp.zeros((1, 1, config.length), jnp.int32), jnp.ones((1, 1, config.length), bool)
        return {"tokens": tokens, "mask": real, "loss_mask": real}, TokenBatch(tokens[0], real[0])

    row, prompts = jax.eval_shape(given)
    optimizer, _ = training.adamw(learning_rate=1e-3, steps=10)
    masters = jax.eval_shape(dataclasses.replace(lm, dtype="float32").init, rng)
    state = jax.eval_shape(lambda params: training.create(params, optimizer), masters)
    found: dict[str, Any] = {"decoding": (jax.jit(decode), (jax.eval_shape(lm.init, rng), rng, prompts))}
    for name, form in (("training step", models.LanguageModel), ("training step, layers in a loop", Scanned)):
        trained = form(lm.config, lm.dtype, remat=config.remat)
        found[name] = training.train_step(objectives.language_model(trained), optimizer), (state, row, None)
    return found


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

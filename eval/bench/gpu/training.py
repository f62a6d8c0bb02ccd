"""Optimizer steps on one GPU: all weights of a small model, and an adapter on a large one."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any, Literal

import jax
import numpy as np

from jaxalign import models, training
from jaxalign.training import adapters, dry_run, flops, objectives, states
from jaxalign.training.options import OptimizerOptions
from jaxalign.types import Params

from .sizes import Row, Rows, Sizes, model, peak_memory

Remat = Literal["none", "dots", "full"]
WARM_UP = 2
RANK = 16


def sft(sizes: Sizes, remat: Remat) -> Rows:
    """The step of train.sft: float32 masters and moments, computed in bfloat16.

    Args:
      sizes: of the model and its rows.
      remat: what the backward pass keeps.

    Returns:
      One row.
    """

    def measure() -> Row:
        lm = dataclasses.replace(model(sizes.small), remat=remat)
        params = models.LanguageModel(lm.config).init(jax.random.key(0))
        return {"step": "sft, 1B", "remat": remat} | _step(sizes, lm, objectives.language_model(lm), params, None)

    yield f"sft, {remat}", measure


def lora(sizes: Sizes, remat: Remat) -> Rows:
    """The step of train.sft --lora-rank 16: weights in bfloat16 that stay as they are, a float32 adapter.

    Args:
      sizes: of the model; one row.
      remat: what the backward pass keeps.

    Returns:
      One row.
    """

    def measure() -> Row:
        lm = dataclasses.replace(model(sizes.large), remat=remat)
        spec = models.Lora(RANK)
        adapter = models.lora.init(jax.random.key(1), models.LanguageModel(lm.config), spec)
        loss = adapters.with_adapter(objectives.language_model(lm), spec)
        frozen = lm.init(jax.random.key(0))
        row = {"step": f"LoRA of rank {RANK}, 8B", "remat": remat}
        return row | _step(sizes._replace(rows=1), lm, loss, adapter, frozen)

    yield f"LoRA, {remat}", measure


def _step(sizes: Sizes, lm: models.LanguageModel, loss: training.Loss, params: Params, frozen: Params) -> Row:
    """Compiles a step, takes some and gives its figures."""
    steps = WARM_UP + sizes.repeats
    optimizer, schedule = states.adamw_of(OptimizerOptions(), steps, lm)
    step: Any = training.train_step(
        loss, optimizer, schedule=schedule, donate=True, gradient_dtype=states.gradient_dtype(lm)
    )
    tokens = np.random.default_rng(0).integers(0, lm.vocab_size, (1, sizes.rows, sizes.length), np.int32)
    real = np.ones(tokens.shape, bool)
    batch = {"tokens": tokens, "mask": real, "loss_mask": real}
    operations = flops.counter(lm, params, frozen)(flops.text_lengths(batch))
    peak = flops.peak_flops(jax.devices()[0].device_kind, str(lm.dtype))
    state = training.create(params, optimizer)
    del params  # the step takes them
    batch = jax.device_put(batch)
    begin = time.perf_counter()
    compiled = step.lower(state, batch, frozen).compile()
    compile_seconds = time.perf_counter() - begin
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch, frozen))
        seconds.append(time.perf_counter() - begin)
    if not np.isfinite(metrics["loss"]):
        raise ValueError(f"loss: expected a number after {steps} steps, found {metrics['loss']}")
    median = statistics.median(seconds[WARM_UP:])
    return {
        "rows x length": f"{sizes.rows} x {sizes.length}",
        "tokens/s": tokens.size / median,
        "s/step": median,
        "TFLOP/s": operations / median / 1e12,
        "MFU": None if peak is None else operations / median / peak,
        "peak GB": peak_memory(),
        "planned GB": dry_run.bytes_held(compiled) / 1e9,
        "compile s": compile_seconds,
    }

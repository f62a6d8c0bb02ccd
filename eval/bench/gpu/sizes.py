"""Shapes, timers and memory of the benchmarks of one GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxalign import models
from jaxalign.models.hf.config import config_from_hf
from jaxalign.training import flops
from jaxalign.types import Params

from .. import shapes

Row = dict[str, Any]
"""Column -> number or text; None where a number is not known on this device."""
Rows = Iterator[tuple[str, Callable[[], Row]]]
"""The rows of a benchmark in order of worth, each with its title and what measures it."""

BANDWIDTH = {
    "NVIDIA A100": 2.04,
    "NVIDIA H100": 3.35,
    "NVIDIA H100 NVL": 3.9,
    "NVIDIA H100 PCIe": 2.0,
    "NVIDIA H200": 4.8,
}
"""Beginning of `jax.Device.device_kind` -> memory bandwidth by its data sheet [TB/s]."""


class Sizes(NamedTuple):
    """What is measured."""

    small: dict[str, Any]
    """config.json of the small model."""
    large: dict[str, Any]
    """config.json of the large model."""
    rows: int
    """Rows of a training step of all weights."""
    length: int
    """Length of a row [tokens]."""
    prompt: int
    """Length of a prompt [tokens]."""
    new: int
    """New tokens of a response."""
    batches: tuple[int, ...]
    """Batch sizes of plain sampling."""
    chunks: tuple[int, int]
    """Batch size and rows of a chunk of deterministic sampling."""
    candidates: int
    """Candidates of ARGS."""
    samples: int
    """Samples of best-of-n, and particles of SMC."""
    attention: tuple[tuple[int, int], ...]
    """Rows and length [tokens] of attention."""
    repeats: int
    """Timed runs, of which the median is taken."""


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
"""Fields of a shape that shows on a CPU that everything runs."""


def of(tiny: bool) -> Sizes:
    """Gives what is measured.

    Args:
      tiny: at sizes for a CPU, whose figures say nothing.

    Returns:
      The sizes.
    """
    small, large = shapes.SHAPES["Llama-3.2-1B"], shapes.SHAPES["Llama-3.1-8B"]
    if not tiny:
        attention = ((2, 2048), (2, 2047), (1, 8192))
        return Sizes(small, large, 4, 2048, 128, 128, (1, 8, 64), (32, 8), 10, 16, attention, 5)
    return Sizes(small | TINY, large | TINY, 2, 9, 3, 2, (1,), (4, 2), 2, 2, ((1, 9),), 1)


def model(values: dict[str, Any], head: models.Head | None = None) -> models.LanguageModel:
    """Makes a model in bfloat16 of a config.json.

    Args:
      values: of the file; no token ends a text.
      head: its head; None for a language model.

    Returns:
      The model.
    """
    return models.with_head(models.LanguageModel(config_from_hf(values), "bfloat16"), head)


def first_and_median(run: Callable[[], Any], repeats: int, calls: int = 1) -> tuple[float, float]:
    """Times a function.

    Args:
      run: gives arrays that are waited for.
      repeats: timed rounds.
      calls: calls of a round, of which the last is waited for.

    Returns:
      Seconds of a call: what the first takes beyond the others, which is the time of the compiler, and the median.
    """

    def round_of(count: int) -> float:
        begin = time.perf_counter()
        found = None
        for _ in range(count):
            found = run()
        jax.block_until_ready(found)
        return (time.perf_counter() - begin) / count

    first = round_of(1)
    round_of(1)  # some libraries choose their kernels at the second call
    median = statistics.median(round_of(calls) for _ in range(repeats))
    return max(first - median, 0.0), median


def peak_memory() -> float | None:
    """Gives the most memory that this process has held on its device.

    Returns:
      Its size [GB]; None on a CPU.
    """
    found = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if found is None else found / 1e9


def bandwidth_share(lm: models.LanguageModel, params: Params, seconds: float) -> float | None:
    """Gives the share of the memory's bandwidth at which a step reads the weights of its matrices once.

    Args:
      lm: the model.
      params: its parameters, 2 bytes each.
      seconds: of a step.

    Returns:
      The share; None where the bandwidth of the device is not known.
    """
    kind = jax.devices()[0].device_kind
    known = [name for name in BANDWIDTH if kind == name or kind.startswith((name + " ", name + "-"))]
    if not known:
        return None
    return 2 * flops.matrix_weights(lm, params) / seconds / (BANDWIDTH[max(known, key=len)] * 1e12)

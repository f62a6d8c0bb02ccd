"""What the benchmarks share: options, the model, placement, alternating timers, and the table that they print."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign import _io, models
from jaxalign.models import sharding
from jaxalign.types import TokenBatch

VOCAB = 8192


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every benchmark."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and activations; torch on a CPU always runs float32."""
    mesh: str = ""
    """Devices by axis, as in data=2,tensor=4; the product of data and fsdp divides every batch size."""
    out: str = ""
    """Folder for NAME.json, the printed rows; none is written when empty."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def check(options: Options, batch: tuple[int, ...]) -> Mesh | None:
    """Checks options that need no model.

    Args:
      options: of the benchmark.
      batch: its batch sizes.

    Returns:
      The mesh, or None for one device.

    Raises:
      ValueError: a value out of range; the option is named.
    """
    if not batch or min(batch) < 1:
        raise ValueError(f"batch: expected sizes of at least 1, found {batch}")
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        # Every integer here counts something that the benchmark needs one of.
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{field.name}: expected at least 1, found {value}")
        if field.name == "width" and any(w % 64 for w in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"width: expected a multiple of 64, the width of a head, found {value}")
    mesh = sharding.make_mesh(options.mesh)
    if any(size % sharding.row_devices(mesh) for size in batch):
        raise ValueError(f"mesh: expected a divisor of every batch size {batch}, found {options.mesh!r}")
    return mesh


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Puts parameters or a state on the mesh, by the table of logical axes.

    Args:
      tree: the arrays.
      mesh: the mesh; None leaves them where they are.

    Returns:
      The same tree.
    """
    return tree if mesh is None else sharding.shard(tree, mesh, others=True)


def share(tree: Any, mesh: Mesh | None) -> Any:
    """Puts arrays on the mesh, their rows shared by its devices.

    Args:
      tree: arrays with the rows first.
      mesh: the mesh; None leaves them where they are.

    Returns:
      The same tree.
    """
    return tree if mesh is None else jax.device_put(tree, sharding.batch_sharding(mesh))


def config(
    *, layers: int = 8, width: int = 512, vocab: int = VOCAB, length: int = 2048, head: models.Head | None = None
) -> models.Config:
    """Gives the shape of the benchmarks' Llama: 33.7 M parameters at the default size, 8 heads, untied.

    Args:
      layers: number of layers.
      width: hidden size.
      vocab: V.
      length: longest text [tokens].
      head: a head in place of lm_head; None for a language model.

    Returns:
      The Config.
    """
    return models.Config(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        intermediate_size=width * 43 // 16,
        max_length=length,
        eos_ids=(0,),
        head=head,
    )


def build(seed: int, cfg: models.Config, dtype: str = "float32") -> tuple[models.LanguageModel, Any]:
    """Makes a model of random weights.

    Args:
      seed: of the weights.
      cfg: the model's shape.
      dtype: of computation and weights.

    Returns:
      (model, parameters).
    """
    lm = models.LanguageModel(cfg, dtype=dtype)
    return lm, lm.init(jax.random.key(seed))


def prompts(batch: int, length: int, seed: int = 0, *, vocab: int = VOCAB) -> TokenBatch:
    """Draws prompts without padding: torch's generate is given its easiest case.

    Args:
      batch: B.
      length: P [tokens].
      seed: of the tokens.
      vocab: V.

    Returns:
      A TokenBatch [B,P].
    """
    tokens = jax.random.randint(jax.random.key(seed), (batch, length), 1, vocab, jnp.int32)
    return TokenBatch(tokens, jnp.ones((batch, length), bool))


def torch_twin(lm: models.LanguageModel, params: Any, cls: str) -> Any:
    """Gives the same weights in transformers' torch model, through a Hugging Face folder.

    Args:
      lm: the model.
      params: its parameters.
      cls: the name of the class in transformers.

    Returns:
      The torch model, in evaluation mode.
    """
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        models.save(path, lm, params)
        model = getattr(transformers, cls).from_pretrained(path, dtype=torch.float32)
    return model.eval()


def alternate(runs: dict[str, Callable[[], Any]], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Times runs that take turns, so that a slow spell of the machine meets all of them.

    Args:
      runs: functions by name, each of which waits for its result.
      repeats: timed rounds.
      warmup: rounds before them.

    Returns:
      The median seconds of each.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device() -> str:
    """Gives the device of the figures, in words.

    Returns:
      Its kind; of a CPU also the number of cores.
    """
    kind = jax.devices()[0].device_kind
    return f"{kind} ({os.cpu_count()} cores, {platform.machine()})" if kind == "cpu" else kind


def report(name: str, rows: list[dict[str, Any]], out: str) -> None:
    """Prints the rows as a table and, with `out`, writes them to a file (temporary name, then rename).

    Args:
      name: of the benchmark.
      rows: of equal columns.
      out: a folder for NAME.json; "" for none.
    """
    print(f"{name} on {device()}, jax {jax.__version__}")
    columns = list(rows[0])
    cells = [columns] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if out:
        folder = pathlib.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"device": device(), "jax": jax.__version__, "rows": rows}, indent=1)
        _io.write_text(folder / f"{name}.json", text + "\n")
        print(f"wrote {folder / (name + '.json')}")

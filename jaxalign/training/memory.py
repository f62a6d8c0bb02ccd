"""Whether an optimizer step fits a device's memory, by a rough count of what it keeps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxalign import _devices, models
from jaxalign.models import row_attention, sharding
from jaxalign.training.options import MeshOptions, Remat
from jaxalign.types import Params

STATE_BYTES = 18
"""Per parameter that is trained: float32 master, two moments and gradient, and a copy in half precision."""


def kept_bytes(lm: models.LanguageModel, *, texts: int, length: int) -> int:
    """Estimates what the backward pass of whole rows keeps without rematerialisation.

    Per token and layer about 16 numbers for each of the width and 6 for each of the MLP's, and for short rows the
    scores and weights of each head; measured for llama's layers on a CPU, within a third.

    Args:
      lm: the model.
      texts: rows.
      length: their length [tokens].

    Returns:
      Bytes, logits and parameters not counted.
    """
    c = lm.config
    each = 16 * c.hidden_size + 6 * c.intermediate_size
    if length <= row_attention.SHORT and not row_attention.kernel_fits(c, lm.dtype):
        each += 2 * c.num_heads * length * 5 // 8
    return texts * length * c.num_layers * each * jnp.dtype(lm.dtype).itemsize


def with_remat(
    lm: models.LanguageModel, params: Params, options: MeshOptions, *, texts: int, length: int
) -> models.LanguageModel:
    """The model with the rematerialisation that --remat says, which is printed where it is not "none".

    "auto" is "full" on an accelerator whose memory is less than the estimate of what a step needs without, else "none":
    a host's memory is not the run's own.

    Args:
      lm: the model that is trained.
      params: its parameters.
      options: --remat, --accumulate and --mesh.
      texts: rows that an optimizer step reads.
      length: the longest [tokens].
    """
    chosen, why = options.remat, "as --remat says"
    if chosen == "auto":
        chosen, why = _by_memory(lm, params, options, texts=texts, length=length)
    if chosen != "none":
        print(f"remat: {chosen}, {why}", flush=True)
    return dataclasses.replace(lm, remat=cast(Any, chosen))


def _by_memory(
    lm: models.LanguageModel, params: Params, options: MeshOptions, *, texts: int, length: int
) -> tuple[Remat, str]:
    limit = _devices.memory()
    if limit is None:
        return "none", ""
    mesh = sharding.make_mesh(options.mesh)
    devices = 1 if mesh is None else mesh.size
    each = -(-texts // (options.accumulate * (1 if mesh is None else sharding.row_devices(mesh))))
    kept = kept_bytes(lm, texts=each, length=length)
    state = STATE_BYTES * sum(math.prod(x.shape) for x in jax.tree.leaves(params)) // devices
    if kept + state <= limit:
        return "none", ""
    sizes = [f"{size / 2**30:.1f} GiB" for size in (kept, state, limit)]
    return "full", "by an estimate: layers would keep {}, training state {}, of the device's {}".format(*sizes)

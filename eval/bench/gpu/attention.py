"""Attention of whole rows on one GPU: cuDNN's kernel beside the form in chunks."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models import row_attention
from jaxalign.training import dry_run
from jaxalign.types import Array

from .sizes import Row, Rows, Sizes, first_and_median, model

CALLS = 10  # a call is short: several are started before the host waits


def forms(sizes: Sizes) -> Rows:
    """Forward pass, and forward and backward pass, of one layer's attention with the large model's heads in bfloat16.

    Args:
      sizes: of the model, and the rows.

    Returns:
      A row for each number and length of rows and each form; without cuDNN where the device has none.
    """
    lm = model(sizes.large)
    names = ("cuDNN", "chunks") if row_attention.kernel_fits(lm.config, lm.dtype) else ("chunks",)
    for rows, length in sizes.attention:
        for form in names:

            def measure(rows: int = rows, length: int = length, form: str = form) -> Row:
                return _row(sizes, rows, length, form)

            yield f"{form}, {rows} x {length}", measure


def _row(sizes: Sizes, rows: int, length: int, form: str) -> Row:
    c = model(sizes.large).config
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    q, k, v = (
        jax.random.normal(key, (rows, length, count, c.head_dim), jnp.bfloat16)
        for key, count in zip(keys[:3], counts, strict=True)
    )
    slope = jax.random.normal(keys[3], (rows, length, c.num_heads * c.head_dim), jnp.bfloat16)
    position = jnp.broadcast_to(jnp.arange(length), (rows, length))
    mask = row_attention.RowMask(jnp.ones((rows, length), bool), position)

    def forward(arrays: tuple[Array, Array, Array], mask: row_attention.RowMask, slope: Array) -> Array:
        return row_attention.attention(*arrays, mask, scale=c.head_dim**-0.5, compact=form == "cuDNN")

    def both(arrays: tuple[Array, Array, Array], mask: row_attention.RowMask, slope: Array) -> Any:
        found, back = jax.vjp(lambda arrays: forward(arrays, mask, slope), arrays)
        return found, back(slope)

    given, row, compiling = ((q, k, v), mask, slope), {}, 0.0
    programs: dict[str, Any] = {}
    for name, function in (("forward", forward), ("forward and backward", both)):
        begin = time.perf_counter()
        programs[name] = jax.jit(function).lower(*given).compile()
        compiling += time.perf_counter() - begin
        run = functools.partial(programs[name], *given)
        row[f"{name} ms"] = 1e3 * first_and_median(run, sizes.repeats, CALLS)[1]
    # All keys count, as in MFU; the backward pass has five products where the forward pass has two.
    operations = 3.5 * 4 * rows * c.num_heads * c.head_dim * length**2
    seconds = row["forward and backward ms"] / 1e3
    return {
        "form": form,
        "rows x length": f"{rows} x {length}",
        **row,
        "TFLOP/s, all keys": operations / seconds / 1e12,
        "held MB": dry_run.bytes_held(programs["forward and backward"]) / 1e6,
        "compile s": compiling,
    }

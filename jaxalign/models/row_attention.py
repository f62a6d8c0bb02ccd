"""Attention of whole rows to themselves: one function, whose mask is described by vectors and never kept as [L,L].

Training, scoring and prefill use it. It has three forms of the same sums:

- short rows: up to four groups of queries, whose scores are kept for the backward pass;
- long rows: chunks of queries whose scores are computed again in the backward pass, so that memory grows with the
  number of tokens and not with the square of the length; all derivatives are right, of any order;
- on a GPU, in bfloat16 or float16: cuDNN's kernel (`jax.nn.dot_product_attention`), which takes the length of each row
  in place of a mask. Its second derivatives raise an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxalign import _devices
from jaxalign._arrays import NEGATIVE
from jaxalign.models.attention import soft_cap, wide_einsum
from jaxalign.models.config import Config
from jaxalign.types import Array

SHORT = 512
"""Rows up to this length [tokens] keep their scores for the backward pass: longer ones are no slower in chunks."""
CHUNK = 64
"""Queries whose scores are alive together in longer rows."""
GROUPS = 4
"""Groups of queries that read no key behind their last: of the square of scores four leave out three eighths."""


class RowMask(NamedTuple):
    """Which tokens of whole rows are real, as vectors."""

    mask: Array
    """[B,L]: True on real tokens, under any padding."""
    position: Array
    """[B,L]: the position of each real token in its text, by which windows are measured."""


Part = tuple[Array, Array, Array]
"""Queries [B,R,Hkv,G,hd], their columns [B,R] and their positions [B,R]."""


def attention(
    q: Array,
    k: Array,
    v: Array,
    rows: RowMask,
    *,
    scale: float,
    cap: float | None = None,
    window: int | None = None,
    at: Array | None = None,
    compact: bool = False,
) -> Array:
    """What tokens read of their own rows: softmax(scale·q·k)·v over the real tokens up to themselves.

    Args:
      q: queries [B,L,H,hd], or [B,R,H,hd] with `at`; each group of H/Hkv heads shares a head of keys and values.
      k: keys [B,L,Hkv,hd].
      v: values [B,L,Hkv,hd].
      rows: which tokens are real.
      scale: of the products q·k; mostly 1/√hd.
      cap: bound of the scores, cap·tanh(score/cap) [1]; None: unbounded.
      window: tokens that are read at most, the query's own included; None: all.
      at: [B,R], the columns of the queries; None: all L in order.
      compact: the real tokens of each row stand first, as the kernel needs it, which is then used for all queries.

    Returns:
      [B,L,H·hd], or [B,R,H·hd] with `at`; undefined at padding.
    """
    batch, count, _, head_dim = q.shape
    length, mask, position = k.shape[1], rows.mask, rows.position
    if compact and at is None:
        return _kernel(q, k, v, mask.sum(axis=1, dtype=jnp.int32), scale, window).reshape(batch, count, -1)
    column = jnp.broadcast_to(jnp.arange(length), (batch, length)) if at is None else at
    queries = position if at is None else jnp.take_along_axis(position, at, axis=1)
    arrays = q.reshape(batch, count, k.shape[2], -1, head_dim), column, queries

    def read(part: Part, keys: int) -> Array:
        """What some of the queries read of the first keys."""
        q, column, queries = part
        reads = mask[:, None, :keys] & (column[:, :, None] >= jnp.arange(keys))
        if window is not None:
            reads &= queries[:, :, None] - position[:, None, :keys] < window
        score = soft_cap(wide_einsum("blgrd,bmgd->bgrlm", q, k[:, :keys]) * scale, cap)
        weight = jax.nn.softmax(jnp.where(reads[:, None, None], score, NEGATIVE), axis=-1).astype(v.dtype)
        return jnp.einsum("bgrlm,bmgd->blgrd", weight, v[:, :keys])

    short = count * length <= SHORT**2
    parts = []
    for start, stop, keys in blocks(length, short) if at is None else [(0, count, length)]:
        q, column, queries = (x[:, start:stop] for x in arrays)
        part = q, column, queries
        parts.append(read(part, keys) if short else _in_chunks(functools.partial(read, keys=keys), part))
    return jnp.concatenate(parts, axis=1).reshape(batch, count, -1)


def blocks(length: int, short: bool = True) -> list[tuple[int, int, int]]:
    """(start, stop, keys) of up to four groups of queries: none reads a key behind its last. The shortest rows stay
    one; groups of long rows hold whole chunks."""
    step = 8 if short else CHUNK
    size = length if length < 128 else step * -(-length // (step * min(GROUPS, -(-length // 64))))
    return [(start, min(start + size, length), min(start + size, length)) for start in range(0, length, size)]


def _in_chunks(read: Callable[[Part], Array], part: Part) -> Array:
    """read(part) in chunks of queries, one after the other. Each is rematerialised in the backward pass, so
    that the scores of one are alive."""
    batch, count = part[0].shape[:2]
    padding = -count % CHUNK

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, CHUNK, *x.shape[2:]), 1, 0)

    # Inside a loop the compiler cannot undo the rematerialisation, so it need not be guarded against.
    one = jax.checkpoint(read, prevent_cse=False)
    found = jnp.moveaxis(jax.lax.map(one, tuple(split(x) for x in part)), 0, 1)
    return found.reshape(batch, -1, *found.shape[3:])[:, :count]


def kernel_fits(config: Config, dtype: DTypeLike) -> bool:
    """Whether cuDNN's kernel serves a model of this type on the devices of this process."""
    if config.block.attention_cap is not None:
        return False
    if _devices.backend() != "gpu" or jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    if not all(part.isdigit() for part in capability.split(".")):  # an AMD device has a name there
        return False
    major = int(capability.split(".")[0])
    return major >= 8 and config.head_dim % 8 == 0 and config.head_dim <= (256 if major >= 9 else 128)


def _kernel(q: Array, k: Array, v: Array, length: Array, scale: float, window: int | None) -> Array:
    """cuDNN's attention of rows whose first length [B] tokens are real: [B,L,H,hd]."""
    count = q.shape[1]
    # Its backward pass refuses rows of odd length, which rows without their last token often have.
    q, k, v = (jnp.pad(x, ((0, 0), (0, -count % 8), (0, 0), (0, 0))) for x in (q, k, v))
    found = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        query_seq_lengths=length,
        key_value_seq_lengths=length,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return found[:, :count]


def order_of(mask: Array) -> Array:
    """Columns [B,L] of each row's real tokens in their order, those of padding after them."""
    return jnp.argsort(~mask, axis=1, stable=True)

"""Array functions that every module needs: rows of trees, and numbers that stand for log 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _devices

Array = jax.Array
ArrayLike = jax.typing.ArrayLike

NEGATIVE = -1e20
"""The finite stand-in for log 0: far below any log-probability plus q/beta, far above overflow when divided by a
temperature. `is_supported` tests for it."""


def take_rows(tree: Any, index: Array) -> Any:
    """Takes rows of every leaf of a state.

    Args:
      tree: leaves [B,...].
      index: [M] integers in [0, B).

    Returns:
      The same tree with leaves [M,...].
    """
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), tree)


def repeat_rows(tree: Any, n: int) -> Any:
    """Repeats every row of every leaf of a state.

    Args:
      tree: leaves [B,...].
      n: copies of each row, which come one after the other.

    Returns:
      The same tree with leaves [B·n,...].
    """
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), tree)


def write(x: Array, slot: Array, new: Array) -> Array:
    """Writes into slots of each row.

    Args:
      x: [B,S,...].
      slot: [B] or [B,m] integers of at least 0; nothing is written where they are S or more.
      new: [B,...] or [B,m,...].

    Returns:
      x with `new` at those slots.
    """
    row = jnp.arange(x.shape[0]).reshape((-1,) + (1,) * (slot.ndim - 1))
    return x.at[dropped(row, slot < x.shape[1], x.shape[0]), slot].set(new, mode="drop")


def dropped(row: Array, writes: Array, rows: int) -> Array:
    """The row of each update of a scatter: where nothing is to be written, one that no way of counting the places finds
    in the array, if the compiler needs that. Otherwise the rows stay in order, by which a mesh divides a scatter."""
    return jnp.where(writes, row, rows + row) if _devices.flattens_scatters() else row


def block_width(vocab: int) -> int:
    """How many neighbouring entries of a row over the vocabulary make a block: about the square root of its size.

    Where a vocabulary is divided over 8 devices, or 2 or 4, no block lies on two of them, if its size allows it: the
    rows would have to be put together first.
    """
    if vocab <= 8 * _BLOCK or vocab % (8 * _BLOCK) == 0 or vocab % 8:
        return min(_BLOCK, vocab)
    share = vocab // 8
    return min((w for w in range(_BLOCK // 8, 8 * _BLOCK) if share % w == 0), default=_BLOCK, key=_far_from_block)


_BLOCK = 128


def draw_width(vocab: int) -> int:
    """How many neighbouring entries make a block of `rollout.draw`: those of `block_width`, if it is within twice the
    usual. Else the size that leaves the fewest numbers to add up, blocks and the entries of one: 128 blocks of 1187 of
    the 151,936 tokens of Qwen, and not 9,496 of 16. Sorting (`largest`) takes all entries of k blocks, and keeps small
    ones.
    """
    width = block_width(vocab)
    if vocab % 8 or vocab <= 8 * _BLOCK or _far_from_block(width) <= 2:
        return width
    share = vocab // 8
    return min((w for w in range(width, 16 * _BLOCK) if share % w == 0), key=lambda w: w + vocab // w, default=width)


def _far_from_block(width: int) -> float:
    return max(width / _BLOCK, _BLOCK / width)


def largest(x: Array, k: int) -> tuple[Array, Array]:
    """Gives the k largest of each row as `jax.lax.top_k` does, equal ones in the order of their places.

    They lie in the k blocks with the largest maxima (equal ones: earlier blocks first), so that only these are sorted.
    On a mesh that divides the vocabulary the maxima and these blocks are exchanged between devices; `jax.lax.top_k`
    puts whole rows together first.

    Args:
      x: [...,V].
      k: how many, at most V.

    Returns:
      (values [...,k], places [...,k] int32).
    """
    if x.ndim != 2:
        values, place = largest(x.reshape(-1, x.shape[-1]), k)
        return values.reshape(*x.shape[:-1], k), place.reshape(*x.shape[:-1], k)
    rows, vocab = x.shape
    width = block_width(vocab)
    if 2 * k * width > vocab:
        found: tuple[Array, Array] = jax.lax.top_k(x, k)
        return found
    filled = jnp.pad(x, ((0, 0), (0, -vocab % width)), constant_values=-jnp.inf).reshape(rows, -1, width)
    blocks = jnp.sort(jax.lax.top_k(filled.max(axis=-1), k)[1], axis=-1)
    inside = jnp.take_along_axis(filled, blocks[..., None], axis=1).reshape(rows, k * width)
    values, place = jax.lax.top_k(inside, k)
    return values, jnp.take_along_axis(blocks, place // width, axis=1) * width + place % width


def where_rows(condition: Array, new: Any, old: Any) -> Any:
    """Chooses row by row between two trees of one structure.

    Args:
      condition: [B] bool; True takes `new`.
      new, old: leaves [B,...].

    Returns:
      A tree of the same structure and shapes.
    """

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def per_row(value: ArrayLike, batch: int, *, name: str) -> Array:
    """Broadcasts a value that may differ per prompt, so that it survives repeated rows (law 3).

    Args:
      value: a scalar or [B].
      batch: B.
      name: of the argument, for the error text.

    Returns:
      [B], in at least float32.

    Raises:
      ValueError: another shape.
    """
    array = at_least_float32(jnp.asarray(value))
    if array.shape not in ((), (batch,)):
        raise ValueError(f"{name}: expected a scalar or shape ({batch},), one per prompt, found shape {array.shape}")
    return jnp.broadcast_to(array, (batch,))


def at_least_float32(x: ArrayLike) -> Array:
    """Converts float16, bfloat16 and integers to float32.

    Args:
      x: numbers of any shape.

    Returns:
      The same numbers and shape; float32 and float64 keep their type.
    """
    array = jnp.asarray(x)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def column(x: ArrayLike) -> Array:
    """Puts numbers of rows beside arrays with one more axis.

    Args:
      x: a scalar or [...].

    Returns:
      The scalar, or [...,1].
    """
    x = jnp.asarray(x)
    return x[..., None] if x.ndim else x


def middle(x: ArrayLike) -> Array:
    """Gives the middle of a group's range, the offset that its numbers share.

    Args:
      x: [...,n].

    Returns:
      [...,1], in at least float32; exactly the common value where all numbers of a group are equal, which a mean of
      them is not: it is rounded by some units in the last place.
    """
    x = at_least_float32(x)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    return low + (high - low) / 2


def centred(x: ArrayLike) -> Array:
    """Gives x − mean(x) over the last axis, exactly 0 where all numbers of a group are equal.

    Args:
      x: [...,n].

    Returns:
      [...,n], in at least float32; they sum to 0 up to rounding of the group's range, whatever its offset.
    """
    inner = at_least_float32(x) - middle(x)
    return inner - inner.mean(axis=-1, keepdims=True)


UNITS = 4
"""Units in the last place of the largest number of a group: differences below are rounding."""


def resolution(x: ArrayLike) -> Array:
    """Gives the size below which differences within a group are rounding: 4 units in the last place of its largest |x|.

    Args:
      x: [...,n].

    Returns:
      [...,1], in at least float32.
    """
    x = at_least_float32(x)
    size: Array = UNITS * jnp.finfo(x.dtype).eps * jnp.abs(x).max(axis=-1, keepdims=True)
    return size


def is_flat(x: ArrayLike) -> Array:
    """Tells the groups whose range is rounding (`resolution`), and holds no signal.

    Args:
      x: [...,n]; a group with an infinite number or NaN is not flat.

    Returns:
      bool [...,1].
    """
    x = at_least_float32(x)
    spread, rounding = x.max(axis=-1, keepdims=True) - x.min(axis=-1, keepdims=True), resolution(x)
    return (spread <= rounding) & jnp.isfinite(rounding)


def is_flat_on_host(x: np.ndarray) -> bool:
    """Whether the range of numbers on the host is rounding in float32, as `is_flat`.

    Args:
      x: of any shape, at least one number.
    """
    return float(x.max() - x.min()) <= UNITS * float(np.finfo(np.float32).eps) * float(np.abs(x).max())


def deviation(inner: Array, *, ddof: int) -> Array:
    """Gives the standard deviation of centred numbers, whatever their size: the square of 1e20 is no float32.

    Args:
      inner: [...,n], x − mean(x).
      ddof: what is subtracted from n.

    Returns:
      [...,1].
    """
    size = jax.lax.stop_gradient(jnp.abs(inner).max(axis=-1, keepdims=True))
    size = jnp.where(size > 0, size, 1)
    return size * jnp.sqrt(((inner / size) ** 2).sum(axis=-1, keepdims=True) / (inner.shape[-1] - ddof))


def log_mean_exp(log_weight: Array, x: Array) -> Array:
    """Gives log Σ_i w_i·exp(x_i) over the last axis, near 0 to the digits of x and not to those of Σ w.

    Args:
      log_weight: [...,n], normalised, in nats.
      x: [...,n], <= 0 where w > 0; 0 where w is 0.

    Returns:
      [...], in nats.
    """
    plain = jax.nn.logsumexp(log_weight + x, axis=-1)
    less = (jnp.exp(log_weight) * jnp.expm1(x)).sum(axis=-1)
    near = less > -0.5  # below, the sum of what is left has more digits
    return jnp.where(near, jnp.log1p(jnp.where(near, less, 0)), plain)


def is_supported(log_prob: Array) -> Array:
    """Tells which log-probabilities are not the stand-in for log 0.

    Args:
      log_prob: of any shape.

    Returns:
      bool of the same shape. NaN counts as supported, so that it surfaces in what is computed from it.
    """
    return ~(log_prob <= NEGATIVE / 2)


def add_scores(scores: Sequence[Array], weights: Array) -> Array:
    """Adds scores or log-probabilities with weights, where log 0 in one of them stays log 0 in the sum.

    Args:
      scores: m arrays q_i [B,K].
      weights: [B,m], of any sign.

    Returns:
      Σ_i w_i·q_i [B,K]; NEGATIVE where a score of weight other than 0 is not supported.
    """
    total, outside = jnp.zeros(()), jnp.zeros((), bool)
    for i, q in enumerate(scores):
        weight, inside = weights[:, i, None], is_supported(q)
        # The product would turn log 0 into a number as large by a weight below 0, or into half of it by 0.5.
        total = total + weight * jnp.where(inside, q, 0)
        outside = outside | (~inside & (weight != 0))
    return jnp.where(outside, NEGATIVE, total)


def with_root_derivatives(root: Array, step: Callable[[Array], Array]) -> Array:
    """Gives a root the derivatives of the implicit function, up to the third.

    From a root whose own derivatives are stopped, each Newton step doubles the order to which they are right: two steps
    make it three. The steps' values, which are rounding, are taken off again. A rule of its own (`jax.custom_jvp`)
    would be right to any order, but jax drops such rules where it splits a `lax.scan` for reverse mode: second
    derivatives inside one would be those of the bisection, and wrong in silence.

    Args:
      root: x [...].
      step: x -> −F(x)/F'(x), F depending on what the root does, with nothing stopped.

    Returns:
      x, of the same value.
    """
    root = jax.lax.stop_gradient(root)
    for _ in range(2):
        moved = step(root)
        root = root + (moved - jax.lax.stop_gradient(moved))
    return root


def drop_weak_types(tree: Any) -> Any:
    """Gives weakly typed leaves their type, since jnp.asarray(0.5) and np.float32(0.5) would otherwise be two traces.

    Args:
      tree: arrays and other leaves.

    Returns:
      The same tree; leaves that are no weakly typed arrays are unchanged.
    """

    def strengthen(leaf: Any) -> Any:
        return jax.lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf

    return jax.tree.map(strengthen, tree)


def look_up(table: ArrayLike, index: ArrayLike, *, name: str = "table") -> Array:
    """Looks rows of a table up by the prompts' index.

    Plain indexing of a jax array takes the last row in silence where the index is past the end. Here that is a
    ValueError where the index is known on the host, and NaN where it is traced.

    Args:
      table: [N,...] numbers.
      index: [B] integers in [0, N).
      name: of the table, for the error text.

    Returns:
      [B,...], in at least float32.

    Raises:
      ValueError: a table without an axis, or an index outside [0, N) that is known on the host.
    """
    array, rows = at_least_float32(table), jnp.asarray(index)
    if array.ndim < 1:
        raise ValueError(f"{name}: expected a table with a row for each prompt's index, found a scalar")
    if not isinstance(rows, jax.core.Tracer):
        outside = (rows < 0) | (rows >= array.shape[0])
        if bool(outside.any()):
            raise ValueError(
                f"{name}: expected a table with a row for each prompt's index, {rows}, found {array.shape[0]} rows"
            )
    rows = jnp.where(rows < 0, array.shape[0], rows)  # a negative index would count from the end
    return jnp.take(array, rows, axis=0, mode="fill", fill_value=jnp.nan)

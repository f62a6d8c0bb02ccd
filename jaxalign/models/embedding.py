"""Looking tokens up in a table that lies on a mesh of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxalign.models import sharding
from jaxalign.types import Array


def look_up(table: Array, tokens: Array, mesh: Mesh | None, dtype: DTypeLike) -> Array:
    """The rows of a table [V,D] at tokens [...]: [...,D] in a dtype, NaN for an id that the table lacks. The gradients
    of a row are added in the table's own type.

    On a mesh each device looks up its rows and columns for the tokens of its neighbours along fsdp; sums over tensor,
    of which one term is not zero, and an exchange of columns for rows along fsdp make [...,D] of them. The partitioner
    would put the table together first.
    """
    if mesh is None or tokens.ndim == 0:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    rows, columns = (sharding.present_axes(mesh, axis) for axis in ("tensor", "fsdp"))
    data = sharding.present_axes(mesh, "data")
    size = tokens.shape[0]
    data = data if size % sharding.size_of(mesh, data) == 0 else ()
    trade = size % sharding.size_of(mesh, (*data, *columns)) == 0

    def local(table: Array, tokens: Array) -> Array:
        place = tokens - jax.lax.axis_index("tensor") * table.shape[0] if rows else tokens
        own = (place >= 0) & (place < table.shape[0])
        found = jnp.where(own[..., None], jnp.take(table, jnp.where(own, place, 0), axis=0).astype(dtype), 0)
        if rows:
            found = jax.lax.psum(found, rows)
        if columns and trade:
            found = jax.lax.all_to_all(found, "fsdp", 0, found.ndim - 1, tiled=True)
        return found

    split = PartitionSpec((*data, *columns)) if trade else PartitionSpec(data, *(None,) * (tokens.ndim - 1), columns)
    found = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(rows, columns), PartitionSpec(data)), out_specs=split
    )(table, tokens)
    lacking = (tokens < 0) | (tokens >= table.shape[0])
    return jnp.where(lacking[..., None], jnp.nan, found)

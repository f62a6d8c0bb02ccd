"""When weights that are split over fsdp are put together: in their layer, or ahead of a loop over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign import _devices
from jaxalign.models import sharding
from jaxalign.types import Array, Params

Gather = Literal["auto", "ahead", "in_turn"]
GATHERS = get_args(Gather)
SHARE_AHEAD = 0.25
"""Of an accelerator's memory: a model that takes no more may be put together ahead of a loop over tokens."""


@jax.custom_jvp
def in_turn(w: Array, x: Array) -> tuple[Array, Array]:
    """A weight and what it multiplies, of which the compiler takes neither without the other: the weight is put
    together from its shards when x is there, not ahead of a loop whose steps change x, and not once for several
    passes."""
    w, x = jax.lax.optimization_barrier((w, x))  # both are read: what nobody reads the compiler takes out of it
    return w, x


def _in_turn_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> Any:
    """The tangents as they are: a barrier of its own would make zeros of those that there are none of, and products of
    them, such as those by the weights under an adapter."""
    return in_turn(*primals), tangents


in_turn.defjvp(_in_turn_jvp, symbolic_zeros=True)


def is_in_turn(gather: Gather, mesh: Mesh | None, whole: Callable[[], int]) -> bool:
    """Tells whether each matrix is put together when its layer multiplies by it.

    Args:
      gather: as `models.LanguageModel` has it.
      mesh: on which the weights lie.
      whole: gives the bytes of a device that holds all layers (`whole_bytes`).

    Returns:
      Never on a mesh that does not split weights over fsdp.
    """
    if not sharding.is_split(mesh, "fsdp"):
        return False
    if gather != "auto":
        return gather == "in_turn"
    memory = _devices.memory()
    return memory is None or whole() > SHARE_AHEAD * memory


def whole_bytes(params: Params, mesh: Mesh, dtype: Any) -> int:
    """Bytes of a transformer's parameters, arrays or shapes, on a device that has put them together over fsdp."""
    places = sharding.placements(params, mesh, {**sharding.RULES, "embed": None})
    sizes = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)), params, places)
    return int(sum(jax.tree.leaves(sizes)) * jnp.dtype(dtype).itemsize)

"""Layers whose backward pass computes again what the forward pass did not keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxalign.types import Array, Params

POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass keeps of a layer beside its input: all that it reads, the products by weights, or nothing."""


class RowLayer(Protocol):
    """A layer as a function of its variables."""

    def __call__(self, variables: Params, x: Array, *more: Any) -> tuple[Array, Any]:
        """x [B,L,D] and arrays without derivatives -> (x, arrays)."""


def rematerialised(layer: RowLayer, remat: str) -> RowLayer:
    """The same layer, of which the backward pass keeps what `POLICIES` says.

    The first derivative and derivatives of that are right; forward mode (`jax.jvp`) of the layer itself raises an
    error.

    Args:
      layer: layer(variables, x, *more) -> (x, arrays); `more` has no derivatives.
      remat: a key of `POLICIES`.
    """
    policy = POLICIES[remat]
    if policy is None:
        return layer
    one = jax.checkpoint(layer, policy=policy)

    @jax.custom_vjp
    def whole(variables: Params, x: Array, *more: Any) -> tuple[Array, Any]:
        return layer(variables, x, *more)

    def forward(variables: Params, x: Array, *more: Any) -> tuple[tuple[Array, Any], Any]:
        found, back = jax.vjp(lambda variables, x: one(variables, x, *more), variables, x)
        return found, (back, variables, more)

    def backward(kept: Any, change: tuple[Array, Any]) -> tuple[Any, ...]:
        back, variables, more = kept
        weights = {leaf.shape for leaf in jax.tree.leaves(variables)}
        return *after(back, change[0], weights)(change), *(None for _ in more)

    whole.defvjp(forward, backward)
    return whole


def after(tree: Any, change: Array, weights: set[tuple[int, ...]]) -> Any:
    """The tree with arrays that depend on `change`, to the same numbers.

    `jax.checkpoint` puts a barrier between the two passes, which XLA removes on a CPU before it orders the program: all
    layers are then computed again before the first is needed, and no memory is saved. The least of |x| and 0 is 0,
    which XLA does not know. Arrays of the shapes of weights are left as they are."""
    zero = jnp.minimum(jnp.abs(change.reshape(-1)[0]), 0)

    def tie(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact) or x.shape in weights:
            return x
        return x + zero.astype(x.dtype)

    return jax.tree.map(tie, tree)

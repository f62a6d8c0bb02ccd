"""Layers whose backward pass computes again what the forward pass did not keep."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxalign import _devices
from jaxalign.types import Array, Params


class Saveable(Protocol):
    """Whether what a primitive computes is kept for the backward pass, as jax.checkpoint_policies say it."""

    def __call__(self, primitive: Any, *shapes: Any, **params: Any) -> bool: ...


POLICIES: dict[str, Saveable | None] = {
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
    # On a CPU products of bfloat16 are computed in float32: both passes convert the weights, and XLA would keep those
    # of the first for the second where both were the same.
    one = jax.checkpoint(lambda variables, x, *more: layer(after(variables, x), x, *more), policy=policy)

    @jax.custom_vjp
    def whole(variables: Params, x: Array, *more: Any) -> tuple[Array, Any]:
        return layer(after(variables, x), x, *more)

    def forward(variables: Any, x: Any, *more: Any) -> tuple[tuple[Array, Any], Any]:
        """Of the variables those that are differentiated by have gradients alone: of a frozen model an adapter's."""
        leaves, tree = jax.tree.flatten(variables)
        trained = [leaf.value if leaf.perturbed else None for leaf in leaves]
        rest, given = [leaf.value for leaf in leaves], jax.tree.map(lambda leaf: leaf.value, more)

        def run(trained: list[Array | None], x: Array) -> tuple[Array, Any]:
            both = [other if leaf is None else leaf for leaf, other in zip(trained, rest, strict=True)]
            found: tuple[Array, Any] = one(jax.tree.unflatten(tree, both), x, *given)
            return found

        found, back = jax.vjp(run, trained, x.value)
        return found, (back, jax.tree.unflatten(tree, trained), given)

    def backward(kept: Any, change: tuple[Any, Any]) -> tuple[Any, ...]:
        back, variables, more = kept
        change = jax.tree.map(_zeros, change)
        slopes, slope = after(back, change[0])(change)
        # The next layer waits for the gradients of this one: else all that they are made of is kept for later.
        slope = after(slope, *slopes)
        _, tree = jax.tree.flatten(variables, is_leaf=lambda leaf: leaf is None)
        return jax.tree.unflatten(tree, slopes), slope, *(None for _ in more)

    whole.defvjp(forward, backward, symbolic_zeros=True)
    return whole


def _zeros(x: Any) -> Array:
    zero = isinstance(x, jax.custom_derivatives.SymbolicZero)
    return jnp.zeros(x.shape, x.dtype) if zero else x


def after(tree: Any, *first: Array | None) -> Any:
    """The tree with arrays that depend on the arrays `first`, to the same numbers, on a CPU.

    `jax.checkpoint` puts a barrier between the two passes. On a CPU XLA removes it before it orders the program: all
    layers are then computed again before the first is needed, and no memory is saved. The least of |x| and 0 is 0,
    which XLA does not know."""
    if _devices.backend() != "cpu":
        return tree
    some = [jax.lax.stop_gradient(x)[(0,) * x.ndim].astype(jnp.float32) for x in first if x is not None and x.size]
    zero = sum(jnp.minimum(jnp.abs(x), 0) for x in some)

    def tie(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return x + jnp.asarray(zero).astype(x.dtype)

    return jax.tree.map(tie, tree)

"""Products with matrices of weights: fused, on meshes of devices, and with the terms of low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.models import gathering, sharding
from jaxalign.models.attention import wide_einsum
from jaxalign.types import Array


class Projection(nn.Module):
    """x·W (+ bias), and the term of a low-rank adapter where the collection "lora" holds one (`models.lora`).

    W [in, *out] has the axes of its columns (`families.fused_shape`), by which it is placed on devices; the bias is
    flat. It is one product of two matrices all the same. in_turn: W is put together once x is there."""

    features: tuple[int, ...]
    use_bias: bool
    dtype: Any
    mesh: Mesh | None
    in_turn: bool = False

    @nn.compact
    def __call__(self, x: Array, start: int = 0, stop: int | None = None) -> Array:
        """[...,in] -> [..., *out]; with start or stop these entries of the last axis but one alone, for the price of
        these."""

        def part(w: Array) -> Array:
            return w if start == 0 and stop is None else w[..., start:stop, :]

        shape = (x.shape[-1], *self.features)
        kernel = part(self.param("kernel", initial_kernel, shape, self.dtype)).astype(self.dtype)
        axes = sharding.logical_axes("/".join(("transformer", *self.path, "kernel")))
        if self.in_turn:
            kernel, x = gathering.in_turn(kernel, x)
        kernel = sharding.hold(kernel, self.mesh, *axes, gather=("fsdp",))
        x = x.astype(self.dtype)
        y = by_rows(lambda flat: columns_of(flat, kernel, split=sharding.is_split(self.mesh, "tensor")), x)
        if self.use_bias:
            bias: Array = self.param("bias", nn.initializers.zeros, (math.prod(self.features),), self.dtype)
            y += part(bias.reshape(self.features)).astype(self.dtype)
        if not self.has_variable("lora", "a"):
            return y
        return y + low_rank(x, self.get_variable("lora", "a"), part(self.get_variable("lora", "b")))


def initial_kernel(rng: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """A kernel [in, *out] from normal(0.02). One of heads [D,Hkv,G+2,hd] is drawn in the order queries, keys, values:
    where a head lies changes no model of a seed."""
    flat: Array = nn.initializers.normal(0.02)(rng, (shape[0], math.prod(shape[1:])), dtype)
    if len(shape) < 4:
        return flat.reshape(shape)
    ahead, heads, group, head_dim = shape[0], shape[1], shape[2] - 2, shape[3]
    parts = jnp.split(flat, [heads * group * head_dim, heads * (group + 1) * head_dim], axis=1)
    return jnp.concatenate([part.reshape(ahead, heads, -1, head_dim) for part in parts], axis=2)


def columns_of(x: Array, kernel: Array, *, split: bool) -> Array:
    """x [N,D] times W [D, *out]: [N, *out], as one product of two matrices; split: whether an axis of `out` may be, of
    which a matrix would have to be put together first. (On a CPU the product without reshaping transposes W.)"""
    if split:
        return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())))
    return (x @ kernel.reshape(kernel.shape[0], math.prod(kernel.shape[1:]))).reshape(x.shape[0], *kernel.shape[1:])


def by_rows(f: Callable[[Array], Array], x: Array) -> Array:
    """f of x [...,D] as one matrix [N,D]. A product's gradient by its weights is then one of two matrices; with more
    axes XLA transposes the larger operand first and multiplies at half the speed on a CPU (140 for 190 GFLOP/s)."""
    y: Array = f(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))  # no −1: an axis may be empty
    return y.reshape(*x.shape[:-1], *y.shape[1:])


def low_rank(x: Array, a: Array, b: Array) -> Array:
    """(x·a)·b of rows x [N,L,D], in x's type. With m stacked adapters, a [m,D,r] and b [m,r,*out], the rows are groups
    of 1+m neighbours: the first of each has no adapter, the i-th after it has the i-th."""
    a, b = a.astype(x.dtype), b.astype(x.dtype)

    def term(x: Array, a: Array, b: Array) -> Array:
        low = by_rows(lambda flat: wide_einsum("nd,dr->nr", flat, a).astype(x.dtype), x)
        flat_b = b.reshape(b.shape[0], math.prod(b.shape[1:]))
        y = by_rows(lambda flat: wide_einsum("nr,ro->no", flat, flat_b).astype(x.dtype), low)
        return y.reshape(*y.shape[:-1], *b.shape[1:])

    if a.ndim == 2:
        return term(x, a, b)
    # One product for each adapter: as one batched product, a CPU transposes every a and b at every step.
    grouped = x.reshape(-1, 1 + a.shape[0], *x.shape[1:])
    terms = [term(grouped[:, i + 1], a[i], b[i]) for i in range(a.shape[0])]
    return jnp.stack([jnp.zeros_like(terms[0]), *terms], axis=1).reshape(*x.shape[:-1], *b.shape[2:])

"""MLPs of which each token runs through a few, computed for all tokens: one after the other, weighted, summed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign._arrays import at_least_float32
from jaxalign.models import sharding
from jaxalign.models.attention import wide_einsum
from jaxalign.models.block import Experts
from jaxalign.models.projections import columns_of
from jaxalign.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""`Block.activation` -> the function."""


class ExpertMLP(nn.Module):
    """Σ_e w_e(x)·down_e(a(gate_e(x))·up_e(x)), w the probabilities of the router, zero of all but the largest few.

    Every expert runs on every token, one expert after the other, so that no more than one of them is alive: exact, and
    count/per_token times the work that the tokens need. On a mesh each expert's columns are divided over tensor, and
    its matrices are put together over fsdp when it runs."""

    spec: Experts
    hidden_size: int
    width: int
    activation: str
    dtype: Any
    mesh: Mesh | None = None

    def setup(self) -> None:
        init, count = nn.initializers.normal(0.02), self.spec.count
        self.router = self.param("router", init, (self.hidden_size, count), self.dtype)
        self.gate_up = self.param("gate_up", init, (count, self.hidden_size, 2, self.width), self.dtype)
        self.down = self.param("down", init, (count, self.width, self.hidden_size), self.dtype)

    def weights(self, flat: Array) -> Array:
        """[N,E] of rows [N,D]: probabilities, zero of the experts that a token does not run through."""
        probability = jax.nn.softmax(at_least_float32(flat @ self.router), axis=-1)
        top, index = jax.lax.top_k(probability, self.spec.per_token)
        if self.spec.normalized:
            top = top / top.sum(axis=-1, keepdims=True)
        return jnp.zeros_like(probability).at[jnp.arange(flat.shape[0])[:, None], index].set(top)

    def __call__(self, x: Array) -> Array:
        flat = x.reshape(-1, self.hidden_size)

        def add(total: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
            weight, gate_up, down = expert
            gate_up = sharding.hold(gate_up, self.mesh, "embed", None, "mlp", gather=("fsdp",))
            down = sharding.hold(down, self.mesh, "mlp", "embed", gather=("fsdp",))
            both = columns_of(flat, gate_up, split=sharding.is_split(self.mesh, "tensor"))
            given = wide_einsum("nf,fd->nd", ACTIVATIONS[self.activation](both[:, 0]) * both[:, 1], down)
            return total + weight[:, None] * given, None

        start = jnp.zeros(flat.shape, jnp.promote_types(x.dtype, jnp.float32))
        total, _ = jax.lax.scan(add, start, (self.weights(flat).T, self.gate_up, self.down))
        return total.astype(x.dtype).reshape(x.shape)

"""Heads on hidden states: a linear reward, or an MLP to one value or to one value per token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.models.config import Head
from jaxalign.models.projections import by_rows
from jaxalign.types import Array

ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "tanh": jnp.tanh}


class HeadModule(nn.Module):
    """Reads hidden [...,D] to [...,W], in at least float32.

    A reward head is h·W without a bias, or bound·sigmoid(h·W) where the spec has a bound. A value or Q head is
    W_n·a(… a(W_1·h + b_1) …) + b_n with the activation a of the spec.
    """

    spec: Head
    width: int
    dtype: Any

    def __call__(self, hidden: Array) -> Array:
        return by_rows(self.layers, hidden)

    @nn.compact
    def layers(self, hidden: Array) -> Array:
        def layer(features: int, bias: bool, name: str) -> nn.Dense:
            init = nn.initializers.normal(0.02)
            return nn.Dense(features, bias, dtype=self.dtype, param_dtype=self.dtype, name=name, kernel_init=init)

        if self.spec.kind == "reward":
            score = at_least_float32(layer(self.width, False, "score")(hidden))
            return score if self.spec.bound is None else self.spec.bound * jax.nn.sigmoid(score)
        for name in self.spec.hidden_layers:
            assert self.spec.hidden_size is not None
            hidden = ACTIVATIONS[self.spec.activation](layer(self.spec.hidden_size, True, name)(hidden))
        return at_least_float32(layer(self.width, True, "outer")(hidden))

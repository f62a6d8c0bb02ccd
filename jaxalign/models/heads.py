"""Heads on hidden states: a linear reward, an MLP to one value or to one per token, or to laws of rewards."""

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
    W_n·a(… a(W_1·h + b_1) …) + b_n with the activation a of the spec. With a distribution these are the logits of a law
    on its support, [...,K] log-probabilities; a Q head's outer layer gives M [rank,K] and b [K], and the law after a
    token z is softmax(M·a_z + b), that of the prefix itself softmax(M·a_own + b).
    """

    spec: Head
    width: int
    dtype: Any
    vocab_size: int = 0

    def __call__(self, hidden: Array) -> Array:
        found = by_rows(self.layers, hidden)
        spec = self.spec.distribution
        if spec is None:
            return found
        if self.spec.kind == "value":
            return jax.nn.log_softmax(found)
        matrix, bias = self._factors(found)
        own = at_least_float32(self.get_variable("params", "own"))
        return jax.nn.log_softmax(jnp.einsum("...rk,r->...k", matrix, own) + bias)

    def after_tokens(self, hidden: Array, tokens: Array) -> Array:
        """The laws after tokens [...,k] at hidden [...,D]: log p [...,k,K]."""
        matrix, bias = self._factors(by_rows(self.layers, hidden))
        factors = at_least_float32(jnp.take(self.get_variable("params", "tokens"), tokens, axis=0))
        return jax.nn.log_softmax(jnp.einsum("...tr,...rk->...tk", factors, matrix) + bias[..., None, :])

    def _factors(self, found: Array) -> tuple[Array, Array]:
        """M [...,rank,K] and b [...,K] of a Q head's outer layer."""
        assert self.spec.distribution is not None
        rank = self.spec.distribution.rank
        parts = found.reshape(*found.shape[:-1], rank + 1, self.width)
        return parts[..., :rank, :], parts[..., rank, :]

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
        outputs, spec = self.width, self.spec.distribution
        if spec is not None and self.spec.kind == "q":
            outputs *= spec.rank + 1
            # Of size 1, not 0.02: a product of two small factors learns slowly.
            spread = nn.initializers.normal(1.0)
            self.param("tokens", spread, (self.vocab_size, spec.rank), self.dtype)
            self.param("own", spread, (spec.rank,), self.dtype)
        return at_least_float32(layer(outputs, True, "outer")(hidden))

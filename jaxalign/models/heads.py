"""Heads on hidden states: a linear reward, an MLP to one value or to one per token, or to laws of rewards."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32
from jaxalign.models.config import Head
from jaxalign.models.projections import by_rows
from jaxalign.types import Array

SPREAD = 4.0
"""Of the functions by which a token moves a law: a weight of 1 moves the mean by about the law's own spread."""
ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "tanh": jnp.tanh}


class HeadModule(nn.Module):
    """Reads hidden [...,D] to [...,W], in at least float32.

    A reward head is h·W without a bias, or bound·sigmoid(h·W) where the spec has a bound. A value or Q head is
    W_n·a(… a(W_1·h + b_1) …) + b_n with the activation a of the spec. With a distribution these are the logits of a law
    on its support, [...,K] log-probabilities. A Q head's outer layer gives b [K], the logits of a law that the tokens
    of a state share, and a token moves it: the law after z is softmax(b + Σ_j s_j(z)·g_j), j from 1 to the rank, with
    s_j(z) = w_zj·f + w_zj0 of the features f that the outer layer reads, and fixed functions g of the place on the
    support (`_curves`): the first moves the law, the second widens it, and so on. The prefix's own law has weights of
    its own. At rank K − 1 any law of each token can be said.
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
        own = self.get_variable("params", "own")[None]
        return self._moved(found, own)[..., 0, :]

    def after_tokens(self, hidden: Array, tokens: Array) -> Array:
        """The laws after tokens [...,k] at hidden [...,D], or after the same tokens [k] at each: log p [...,k,K]."""
        weights = jnp.take(self.get_variable("params", "tokens"), tokens, axis=0)
        return self._moved(by_rows(self.layers, hidden), weights)

    def _moved(self, found: Array, weights: Array) -> Array:
        """log p [...,k,K] of a Q head's features and shared logits [...,F+1+K], moved by weights [...,k,rank·(F+1)], or
        [k,rank·(F+1)] for all."""
        assert self.spec.distribution is not None
        features, shared = found[..., : -self.width], found[..., -self.width :]
        weights = at_least_float32(weights).reshape(*weights.shape[:-1], self.spec.distribution.rank, -1)
        rows = "..." if weights.ndim > 3 else ""
        moves = jnp.einsum(f"...f,{rows}tjf->...tj", features, weights)
        curves = jnp.asarray(_curves(self.width, self.spec.distribution.rank), moves.dtype)
        return jax.nn.log_softmax(shared[..., None, :] + moves @ curves)

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
        spec, found = self.spec.distribution, at_least_float32(layer(self.width, True, "outer")(hidden))
        if spec is None or self.spec.kind != "q":
            return found
        # The weights of a token are a row of their own, as those of a Q head of values are: what a token does to the
        # law is learned as fast. The last entry stands for a constant.
        spread, weights = nn.initializers.normal(0.02), spec.rank * (hidden.shape[-1] + 1)
        self.param("tokens", spread, (self.vocab_size, weights), self.dtype)
        self.param("own", spread, (weights,), self.dtype)
        features = at_least_float32(hidden)
        return jnp.concatenate([features, jnp.ones_like(features[..., :1]), found], axis=-1)


def _curves(points: int, rank: int) -> np.ndarray:
    """g_j [rank,points]: SPREAD·T_j at the places of the support points, even in [−1, 1], T_j the polynomials of
    Chebyshev."""
    place = np.linspace(-1, 1, points)
    return SPREAD * np.cos(np.arange(1, rank + 1)[:, None] * np.arccos(place))

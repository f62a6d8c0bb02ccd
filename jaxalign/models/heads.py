"""Heads on hidden states: a linear reward, or an MLP to one value or to one value per token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxalign.models.config import Head
from jaxalign.types import Array, at_least_float32


class HeadModule(nn.Module):
    """hidden [...,D] -> [...,W], in at least float32. SiLU between the two layers of an MLP."""

    spec: Head
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        def layer(features: int, bias: bool, name: str) -> nn.Dense:
            init = nn.initializers.normal(0.02)
            return nn.Dense(features, bias, dtype=self.dtype, param_dtype=self.dtype, name=name, kernel_init=init)

        if self.spec.kind == "reward":
            return at_least_float32(layer(self.width, False, "score")(hidden))
        if self.spec.hidden_size is not None:
            hidden = jax.nn.silu(layer(self.spec.hidden_size, True, "inner")(hidden))
        return at_least_float32(layer(self.width, True, "outer")(hidden))

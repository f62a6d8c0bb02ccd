"""How the tensors of a checkpoint are packed: all parts of a projection in one, or one for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.models.config import Config
from jaxalign.models.families.rules import Rule, numpy_of, split_sizes
from jaxalign.types import Array


def unpacked(config: Config, rule: Rule, tensor: Any) -> list[Array]:
    """The parts [...,width] of a tensor [...,out] that holds all of them, in the order of `split_sizes`.

    "concatenated": part after part; "by_group": for each head of keys its queries, then the key and the value."""
    widths = split_sizes(config, rule.sizes)
    if rule.packed == "concatenated":
        return list(numpy_of(tensor).split(tensor, np.cumsum(widths)[:-1].tolist(), axis=-1))
    groups = tensor.reshape(*tensor.shape[:-1], config.num_kv_heads, -1, config.head_dim)
    parts = numpy_of(tensor).split(groups, [groups.shape[-2] - 2, groups.shape[-2] - 1], axis=-2)
    return [part.reshape(*tensor.shape[:-1], -1) for part in parts]


def packed(config: Config, rule: Rule, parts: Sequence[Any]) -> Array:
    """The tensor [...,out] of these parts: `unpacked` undone."""
    if rule.packed == "concatenated":
        joined: Array = numpy_of(parts[0]).concatenate(parts, axis=-1)
        return joined
    heads = [part.reshape(*part.shape[:-1], config.num_kv_heads, -1, config.head_dim) for part in parts]
    grouped: Array = numpy_of(parts[0]).concatenate(heads, axis=-2)
    return grouped.reshape(*parts[0].shape[:-1], -1)


def stack_experts(config: Config, tensors: Sequence[Any]) -> Array:
    """Matrices [in,out], of each expert one or two after each other, as [E,in,out] or [E,in,2,out]."""
    assert config.block.experts is not None
    stacked: Array = numpy_of(tensors[0]).stack(tensors).reshape(config.block.experts.count, -1, *tensors[0].shape)
    return stacked[:, 0] if stacked.shape[1] == 1 else stacked.swapaxes(1, 2)


def unstack_experts(array: Any) -> list[Array]:
    """The matrices [in,out] of `stack_experts`."""
    parts = array[:, None] if array.ndim == 3 else array.swapaxes(1, 2)
    return list(parts.reshape(-1, *parts.shape[2:]))

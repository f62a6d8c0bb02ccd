"""Parameters of rewards. A dict with the same keys is taken as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.types import ArrayLike, Params


class LabelParams(NamedTuple):
    """Parameters of `from_model` and `token_gradient` of a weighted sum of the model's labels."""

    model: Params
    """The parameters of the model."""
    weights: ArrayLike
    """[W], a weight for each label of the model, in the order of its `label_names`."""


class WeightedSumParams(NamedTuple):
    """Parameters of `weighted_sum`."""

    rewards: Sequence[Params]
    """The parameters of each reward."""
    weights: ArrayLike
    """[m], a weight per reward."""


class PoolParams(NamedTuple):
    """Parameters of `pool`."""

    rewards: Sequence[Params]
    """The parameters of each reward."""
    pool: Params = None
    """Those of the function."""


class MapParams(NamedTuple):
    """Parameters of `map_reward`, `calibrated` and `shaped`."""

    reward: Params
    """The parameters of the reward below."""
    map: Params
    """The parameters of the map: `CalibratedParams`, `ShapedParams`, or those of a function of your own."""


class CalibratedParams(NamedTuple):
    """Parameters of the map of `calibrated`."""

    table: ArrayLike
    """[prompts,K], the rewards of K >= 2 base samples of each prompt, ascending (`infalign.calibration_table`)."""


class ShapedParams(NamedTuple):
    """Parameters of the map of `shaped`."""

    threshold: ArrayLike
    """[prompts], or one number for all [reward]."""
    bound: ArrayLike
    """The reward paid above the threshold, one number > 0."""

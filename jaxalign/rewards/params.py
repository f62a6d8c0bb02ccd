"""Parameters of the combinators of rewards. A dict with the same keys is taken as well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

from jaxalign.types import ArrayLike, Params


class WeightedSumParams(NamedTuple):
    """Parameters of `weighted_sum`."""

    rewards: Sequence[Params]
    """The parameters of each reward."""
    weights: ArrayLike
    """[m], a weight per reward."""


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


Fields = TypeVar("Fields", bound=NamedTuple)


def fields_of(params: Params, kind: type[Fields], *, name: str) -> Fields:
    """Reads parameters given as `kind` or as a dict of its fields.

    Args:
      params: what was given.
      kind: a NamedTuple of this file.
      name: the combinator, which the error names.

    Returns:
      The parameters as `kind`.

    Raises:
      ValueError: another type, a missing entry or one too many.
    """
    if isinstance(params, kind):
        return params
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params: expected an entry {kind._fields[0]!r} for {name} ({kind.__name__} or a dict of its fields), "
            f"found {type(params).__name__}"
        )
    for entry in kind._fields:
        if entry not in params:
            raise ValueError(f"params: expected an entry {entry!r} for {name}, found {sorted(map(str, params))}")
    surplus = sorted(str(key) for key in params if key not in kind._fields)
    if surplus:
        raise ValueError(f"params: expected the entries {list(kind._fields)} for {name}, found also {surplus}")
    return cast(Callable[..., Fields], kind)(**params)


@contextlib.contextmanager
def below(path: str) -> Iterator[None]:
    """Puts the path of the parameters before the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

"""Modules of flax and equinox as a function of parameters and arrays, for `from_nnx` and `from_equinox`."""

from __future__ import annotations

from typing import Any

import jax

from jaxalign._builders import cached
from jaxalign._parts import called
from jaxalign.types import Params


def of_nnx(module: Any) -> tuple[Any, Params]:
    """(f, params), f(params, *arrays) = module(*arrays); one f for equal definitions."""
    from flax import nnx

    definition, params = nnx.split(module)
    return _nnx_function(definition), params


@cached
def _nnx_function(definition: Any) -> Any:
    from flax import nnx

    def apply(params: Params, *arrays: Any) -> Any:
        return nnx.merge(definition, params)(*arrays)

    return apply


def of_equinox(module: Any) -> tuple[Any, Params]:
    """(f, params), f(params, *arrays) = module(*arrays); params are the module's arrays, and there is one f for modules
    that are equal in all else."""
    import equinox

    if not callable(module):
        raise ValueError(f"module: expected a module that can be called, found {called(type(module))}")
    params, rest = equinox.partition(module, equinox.is_array)
    leaves, form = jax.tree.flatten(rest)
    return _equinox_function(form, tuple(leaves)), params


@cached
def _equinox_function(form: Any, leaves: tuple[Any, ...]) -> Any:
    import equinox

    rest = jax.tree.unflatten(form, leaves)

    def apply(params: Params, *arrays: Any) -> Any:
        return equinox.combine(params, rest)(*arrays)

    return apply

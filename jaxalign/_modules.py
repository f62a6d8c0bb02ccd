"""Modules of flax, equinox and torch as a function of parameters and arrays, for `from_nnx`, `from_equinox` and
`from_torch`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._builders import cached
from jaxalign._parts import called
from jaxalign._programs import ProgramError, for_callback, naming
from jaxalign.types import Array, Params


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


@cached
def of_torch(module: Any, *, vocab_size: int | None = None) -> Any:
    """f(params, tokens [N,L], mask [N,L]) of a torch module, which a callback calls on the host: [N,L,V], or with no
    vocab_size a number per text [N]. The params are none; an output with `logits` is read, and [N,1] is [N]."""
    if not callable(module):
        raise ValueError(f"module: expected a torch module that can be called, found {called(type(module))}")
    name = f"from_torch: {getattr(module, '__qualname__', type(module).__name__)}"  # a module's repr has many lines

    def host(tokens: Any, mask: Any) -> np.ndarray[Any, Any]:
        given = np.array(tokens, np.int64), np.array(mask, bool)  # of its own: torch writes to what it is given
        expected = (*given[0].shape, vocab_size) if vocab_size else given[0].shape[:1]
        with naming(module, name, f"numbers of shape {expected}"):
            import torch

            device = _device(module)
            with torch.no_grad():
                arrays = (torch.from_numpy(x) for x in given)
                output = module(*(x if device is None else x.to(device) for x in arrays))
            found = np.asarray(getattr(output, "logits", output).float().cpu().numpy())
        if not vocab_size and found.shape == (*expected, 1):
            found = found[:, 0]
        if found.shape != expected:
            raise ProgramError(f"{name}: expected numbers of shape {expected}, found {found.shape}")
        return found

    in_program = for_callback(host)

    def apply(params: Params, tokens: Array, mask: Array, /) -> Array:
        shape = (*tokens.shape, vocab_size) if vocab_size else tokens.shape[:1]
        found: Array = jax.pure_callback(
            in_program, jax.ShapeDtypeStruct(shape, jnp.float32), tokens, mask, vmap_method="sequential"
        )
        return found

    return apply


def _device(module: Any) -> Any:
    """Where a torch module's parameters lie; None of a function and of a module without parameters."""
    parameters = getattr(module, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return None if first is None else first.device

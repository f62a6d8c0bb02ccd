"""What the parameters of a model have to be: checked on the host, so that those of another model are named where they
stand and not deep in a pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxalign._checks import ParamsError
from jaxalign._parts import described
from jaxalign.models.config import Config
from jaxalign.types import Array, Params


class Initialised(Protocol):
    """A model that makes parameters: hashable, so that their shapes are found once."""

    @property
    def config(self) -> Config:
        """Its sizes."""

    def __hash__(self) -> int: ...

    def init(self, rng: Array) -> Params:
        """Random parameters."""


def part_of(params: Params, name: str) -> Any:
    """The entry "transformer" or "head" of a model's parameters. ParamsError where they have none."""
    if not isinstance(params, Mapping) or name not in params:
        found = f"the entries {[*map(str, params)]}" if isinstance(params, Mapping) else None
        raise ParamsError(
            "expected the parameters of a model, as models.load and LanguageModel.init give them, with an entry "
            f"{name!r}, found {found or described(params)}"
        )
    return params[name]


def check_params(lm: Initialised, params: Params, *, head: bool) -> None:
    """ParamsError naming the first array of the model that its parameters lack or have in another shape; of the head
    where `head` is True. What they hold beside it, such as an adapter or a head that is not read, is let through."""
    expected = _expected(lm)
    for name in ("transformer", "head") if head and "head" in expected else ("transformer",):
        found = {jax.tree_util.keystr(path): leaf for path, leaf in _leaves(part_of(params, name))}
        for path, leaf in _leaves(expected[name]):
            where = jax.tree_util.keystr(path)
            shape = np.shape(found[where]) if where in found else None
            if shape != leaf.shape:
                c = lm.config
                raise ParamsError(
                    f"expected an array of shape {leaf.shape}, as of a model of {c.num_layers} layers of width "
                    f"{c.hidden_size} over {c.vocab_size} tokens, found "
                    + ("none" if shape is None else f"shape {shape}")
                    + " (the parameters of another model?)",
                    f"[{name!r}]{where}",
                )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


@functools.lru_cache(maxsize=64)
def _expected(lm: Initialised) -> dict[str, Any]:
    """The shapes of the model's parameters."""
    shapes: dict[str, Any] = jax.eval_shape(lm.init, jax.random.key(0))
    return shapes

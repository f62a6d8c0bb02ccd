"""Safetensors files as they are opened here: whatever is wrong with one is a ValueError that names the file.

The library's own errors name no file, and some of its numbers are no weights: integers, NaN, infinities.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxalign._files import check_regular

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""safetensors' names of the types that weights have."""


class TensorFile(NamedTuple):
    """An open safetensors file, whose tensors are read by parts."""

    path: pathlib.Path
    """Where it is."""
    handle: Any
    """The library's."""

    def names(self) -> list[str]:
        """The tensors' names."""
        return [str(key) for key in self.handle.keys()]  # noqa: SIM118

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's axes. ValueError for a tensor of another type than weights have."""
        with _naming(self.path):
            found = self.handle.get_slice(key)
        if found.get_dtype() not in FLOATS:
            raise ValueError(f"{key}: expected weights of a type of {FLOATS}, found {found.get_dtype()} in {self.path}")
        return tuple(found.get_shape())

    def read(self, key: str, index: tuple[slice, ...] | None = None, *, finite: bool = False) -> Any:
        """A part of a tensor, or all. ValueError for what cannot be read; with `finite`, for NaN and infinities."""
        with _naming(self.path):
            found = self.handle.get_tensor(key) if index is None else self.handle.get_slice(key)[index]
        if finite:
            check_finite(np.asarray(found), key, self.path)
        return found


@contextlib.contextmanager
def open_tensors(path: pathlib.Path, framework: str = "numpy") -> Iterator[TensorFile]:
    """Opens a safetensors file.

    Args:
      path: the file.
      framework: of the arrays that are read, "numpy" or "flax".

    Raises:
      ValueError: what is no file, or none of safetensors; it names the file.
    """
    import safetensors

    check_regular(path)
    with contextlib.ExitStack() as stack:
        with _naming(path):
            handle = stack.enter_context(safetensors.safe_open(path, framework))
        yield TensorFile(path, handle)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Turns the errors of the library into one that names the file."""
    import safetensors

    try:
        yield
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path.name}: expected a safetensors file, found {first} in {path}") from error


EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00}
"""Name of a type -> the bits that are all ones in NaN and infinities alone. To look at them is ten times as fast."""


def is_finite(array: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinities."""
    ones = EXPONENTS.get(array.dtype.name)
    if ones is None or not array.size:
        return bool(np.isfinite(array).all())
    return int((array.view(np.uint16) & np.uint16(ones)).max()) != ones


def check_finite(array: np.ndarray, key: str, path: pathlib.Path, *, made: str = "") -> None:
    """ValueError for a tensor with NaN or infinities, which a model gives on to all that it computes; `made`: of what
    the file holds."""
    if not is_finite(array):
        count = int((~np.isfinite(array)).sum())
        raise ValueError(
            f"{key}: expected finite weights, found {count} that are NaN or infinite{made} in {path}; "
            "check_finite=False reads them as they are"
        )

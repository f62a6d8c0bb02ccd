"""Safetensors files, written tensor by tensor: a model is never whole on the host, nor a second time on a device."""

from __future__ import annotations

import json
import math
import pathlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.models.hf.files import write_json

WRITER = "jaxalign"
"""What the metadata of our own files have under "writer". Anyone can write it: nothing here goes by it."""

SHARD_BYTES = 4 << 30
"""Largest file that is written; a model beyond it is written in shards."""

BLOCK = 4 << 20
"""Bytes that are written together."""

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Name of a type -> safetensors' name of it."""


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    """Its name in the checkpoint."""
    shape: tuple[int, ...]
    """Its axes there."""
    dtype: str
    """A key of `DTYPES`."""
    source: str
    """The array that it is a part of: tensors of one source follow each other and share one fetch."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(_numpy_type(self.dtype)).itemsize


def _numpy_type(name: str) -> np.dtype:
    import ml_dtypes  # jax needs it too

    return np.dtype(getattr(ml_dtypes, name, None) or name)


def write_tensors(
    folder: pathlib.Path, tensors: Sequence[Planned], fetch: Callable[[str], Mapping[str, np.ndarray]]
) -> None:
    """Writes one file, or shards of at most SHARD_BYTES with their index, as transformers writes them.

    Args:
      folder: to write to.
      tensors: all tensors, those of a source beside each other.
      fetch: source -> its tensors by name, on the host. It is called once for each source, in their order.

    Raises:
      ValueError: a type that safetensors files of ours do not hold.
    """
    _check_types(tensors)
    kept: dict[str, np.ndarray] = {}  # of the source whose turn it is

    def take(one: Planned) -> np.ndarray:
        if one.name not in kept:
            kept.update(fetch(one.source))
        return kept.pop(one.name)

    shards: list[list[Planned]] = [[]]
    size = 0
    for one in tensors:
        if shards[-1] and size + one.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.nbytes
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], take)
        return
    weight_map: dict[str, str] = {}
    for i, part in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, part, take)
        weight_map |= {one.name: name for one in part}
    total = sum(one.nbytes for one in tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one file of arrays that are on the host. Equal arrays give equal bytes, which safetensors' own writer does
    not: the order of its metadata is drawn anew in each file.

    Args:
      path: of the file.
      arrays: name -> array; wider types come first, as safetensors orders them.

    Raises:
      ValueError: a type that safetensors files of ours do not hold.
    """
    plan = [Planned(name, x.shape, x.dtype.name, name) for name, x in arrays.items()]
    _check_types(plan)
    plan.sort(key=lambda one: (-_numpy_type(one.dtype).itemsize, one.name))
    _write_file(path, plan, lambda one: arrays[one.name])


def _check_types(tensors: Sequence[Planned]) -> None:
    for one in tensors:
        if one.dtype not in DTYPES:
            raise ValueError(f"{one.name}: expected a type of {tuple(DTYPES)}, found {one.dtype}")


def _write_file(path: pathlib.Path, tensors: Sequence[Planned], take: Callable[[Planned], np.ndarray]) -> None:
    """A file in the form of safetensors: the length of the header, the header, the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", "writer": WRITER}}
    end = 0
    for one in tensors:
        begin, end = end, end + one.nbytes
        header[one.name] = {"dtype": DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        for one in tensors:
            array = take(one)
            if array.shape != one.shape or array.dtype.name != one.dtype:
                raise AssertionError(f"{one.name}: {array.dtype} {array.shape} where {one} was planned")
            rows = max(BLOCK // max(one.nbytes // max(len(array), 1), 1), 1)
            for i in range(0, len(array), rows):  # a transposed tensor is turned block by block
                sink.write(np.ascontiguousarray(array[i : i + rows]).view(np.uint8).data)
            del array  # before the next is fetched

"""Files that are whole or absent: one way to write them, and readers that name what is damaged.

What is written lies under a temporary name first, is on disk before it takes its own name, and is removed where the
write fails.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from jaxalign import _hosts

DIGEST = "digest"
"""Name of the array of a .npz that holds the digest of the others."""

SIDECAR = ".blake2b"
"""What follows a file's name in the name of the file with its digest."""


# Writing --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file to write: at the end of the block it is on disk under its name, after an error it is not there.

    Args:
      path: of the file; what stands there stays until the new one is whole.

    Returns:
      A context of a binary file.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def temporary_name(path: pathlib.Path) -> pathlib.Path:
    """The name under which a file is written before it is whole."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: pathlib.Path) -> None:
    """Has the names in a folder on disk; file systems that cannot open a folder do so by themselves."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(folder: pathlib.Path) -> None:
    """Has all files below a folder on disk, and their names."""
    for place, _, names in os.walk(folder):
        for name in names:
            with (pathlib.Path(place) / name).open("rb") as source:
                os.fsync(source.fileno())
        sync_folder(pathlib.Path(place))


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    with whole_file(path) as sink:
        sink.write(text.encode())


def write_lines(path: pathlib.Path, rows: Iterable[Any], *, digest: bool = False) -> None:
    """Writes JSON lines in ASCII, whole or not at all.

    Args:
      path: of the file.
      rows: a line for each.
      digest: keep the digest of the file beside it, which `check_digest` reads.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if digest:  # before the file: one that stands there has its digest
        write_text(sidecar(path), digest_of(text.encode()) + "\n")
    write_text(path, text)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Indented JSON, whole or not at all; of several processes, all of which have to call it, the first writes.
    ValueError for NaN and infinities, which are not JSON."""
    with _hosts.together():
        if _hosts.is_first():
            write_own_json(path, values)


def write_own_json(path: pathlib.Path, values: Any) -> None:
    """`write_json` by this process, whichever it is."""
    write_text(path, json.dumps(values, indent=2, default=str, allow_nan=False) + "\n")


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes a .npz with the digest of its arrays, whole or not at all."""
    kept: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    with whole_file(path) as sink:
        np.savez(sink, **kept, digest=np.asarray(_digest_of_arrays(kept)))


def _digest_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Of names, types, shapes and numbers."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def digest_of(data: bytes) -> str:
    """The digest of bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sidecar(path: pathlib.Path) -> pathlib.Path:
    """The hidden file that holds the digest of a file beside it."""
    return path.with_name(f".{path.name}{SIDECAR}")


# Reading --------------------------------------------------------------------------------------------------------------


def read_json(path: pathlib.Path, *, then: str, kind: type = dict) -> Any:
    """Reads a JSON file that a job wrote.

    Args:
      path: of the file.
      then: what the reader may do where it is damaged, for the error.
      kind: dict or list.

    Returns:
      What it holds.

    Raises:
      ValueError: it is empty, cut short or otherwise no JSON of that kind; the file and `then` are named.
      FileNotFoundError: there is none.
    """
    data = path.read_bytes()
    try:
        if not data.strip():
            raise ValueError("an empty file")
        found = json.loads(data.decode())
        if not isinstance(found, kind):
            raise ValueError(f"a JSON {type(found).__name__}")
    except (ValueError, RecursionError) as error:  # of the encoding or of JSON
        name = "object" if kind is dict else "array"
        raise ValueError(f"{path.name}: expected a whole JSON {name}, found {error} in {path}; {then}") from None
    return found


def read_arrays(path: pathlib.Path, names: Sequence[str], *, then: str) -> dict[str, np.ndarray]:
    """Reads a .npz of `write_arrays`, or one from before there were digests.

    Args:
      path: of the file.
      names: arrays that it has to hold.
      then: what the reader may do where it is damaged, for the error.

    Returns:
      Name -> array, of all arrays.

    Raises:
      ValueError: the file is damaged or lacks an array; it and `then` are named.
      FileNotFoundError: there is none.
    """
    data = path.read_bytes()
    why = "a damaged file" if data else "an empty file"
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as source:
            found: dict[str, np.ndarray] = {name: source[name] for name in source.files}
        digest = found.pop(DIGEST, None)
        if digest is not None and str(digest) != _digest_of_arrays(found):
            why = "numbers of another digest"
            raise ValueError
        if lacking := [name for name in names if name not in found]:
            why = f"none of {lacking}"
            raise ValueError
    except Exception:  # there are many of zip files and of numpy's format
        text = f"{path.name}: expected the arrays {', '.join(names)}, found {why} in {path}; {then}"
        raise ValueError(text) from None
    return found


def check_digest(path: pathlib.Path, *, then: str) -> None:
    """Checks a file against the digest that was kept beside it.

    Args:
      path: of the file.
      then: what the reader may do where it is damaged, for the error.

    Raises:
      ValueError: the file has another digest. One without a digest passes.
    """
    kept = sidecar(path)
    if kept.exists() and kept.read_text(errors="replace").strip() != file_digest(path):
        raise ValueError(f"{path.name}: expected the file as it was written, found another digest of {path}; {then}")


def file_digest(path: pathlib.Path) -> str:
    """The digest of a file, read in parts."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as source:
        while part := source.read(1 << 24):
            found.update(part)
    return found.hexdigest()


def file_digests(paths: Sequence[pathlib.Path]) -> list[str]:
    """The digests of files, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(file_digest, paths))


def expand_names(source: str | os.PathLike[str]) -> list[str]:
    """The names in a list with commas between them; a glob stands for the files that it matches, in alphabetical order.

    What exists under the whole name is one name; a glob that matches nothing stays as it is.
    """
    whole = os.fspath(source)
    if os.path.exists(whole):
        return [whole]
    names: list[str] = []
    for part in filter(None, (part.strip() for part in whole.split(","))):
        if os.path.exists(part) or not glob.has_magic(part.partition("@")[0]):
            names.append(part)
            continue
        names += sorted(glob.glob(part, recursive=True)) or [part]
    return names

"""Files of a model's folder: where the folder is, its JSON, and folders that are whole or absent."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pathlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from jaxalign import _io, _locks
from jaxalign._files import printed, read_text


@contextlib.contextmanager
def whole_folder(path: str | pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """A temporary folder to write to, renamed to `path` at the end: what stands there is whole, old or new.
    ValueError when the target is a file, or holds files and `overwrite` is False."""
    target = pathlib.Path(path)
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(target)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-{os.getpid()}-", dir=target.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        temporary.chmod(0o755)
        _io.sync_tree(temporary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _io.sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _remove_left_behind(target: pathlib.Path) -> None:
    """Removes what killed processes of this machine had begun to write for a folder; where one was killed between two
    names, the old folder gets its name back."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        pid = path.name.removeprefix(f".{target.name}.tmp-").partition("-")[0]
        if not (pid.isdecimal() and _locks.is_gone(int(pid), None)):
            continue
        if path.name.endswith(".old") and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def check_target(target: pathlib.Path, *, overwrite: bool) -> None:
    """ValueError when a folder to write is a file, or holds files and `overwrite` is False."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"path: expected a folder, found a file {target}")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"path: expected a new or empty folder, found files in {target} (overwrite=True replaces it)")


def local_folder(path: str | pathlib.Path, *, revision: str | None = None) -> pathlib.Path:
    """The folder of a path, or of a model on the hub by its name, which is downloaded. ValueError: no such folder.

    revision: of a model on the hub; None is its main one.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not folder.parent.is_dir():
        from huggingface_hub import errors, snapshot_download  # needed for models on the hub alone

        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        try:
            return pathlib.Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
            # A misspelt folder of two names looks like a model of the hub.
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise ValueError(
                f"path: expected a folder or a model of the hub, found no folder {path}; {reason}"
            ) from error
    raise ValueError(f"path: expected a folder with config.json and safetensors, found none at {folder}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The dict of a JSON file. ValueError for a file that is missing, or that holds no JSON object."""
    if not path.exists():
        raise ValueError(f"{path.name}: expected in the folder, found no file {path}")
    text = read_text(path)
    try:
        values = json.loads(text, object_pairs_hook=_agreeing)
    except (ValueError, RecursionError) as error:  # of JSON, or of its depth
        raise ValueError(f"{path.name}: expected JSON, found {error} in {path}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: expected a JSON object, found {type(values).__name__} in {path}")
    return values


def _agreeing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object. ValueError where one stands twice with different values, of which Python would drop
    the first."""
    found = dict(pairs)
    for name, value in pairs:
        if found[name] != value and found[name] == found[name]:  # NaN is told by whoever reads the field
            raise ValueError(f"{name!r:.200} twice, as {printed(value)} and {printed(found[name])}")
    return found


MOST_LETTERS = 1000
"""Of a message about a file."""


@contextlib.contextmanager
def naming_file(path: pathlib.Path) -> Iterator[None]:
    """Adds the file to a ValueError that does not name it, and cuts what is long: a file may hold anything."""
    try:
        yield
    except ValueError as error:
        words = str(error)
        if str(path) in words and len(words) <= 2 * MOST_LETTERS:
            raise
        words = words if len(words) <= MOST_LETTERS else f"{words[:MOST_LETTERS]}… found"
        raise ValueError(f"{words} in {path}") from error


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def tell(message: str) -> None:
    """Tells what was passed over or changed while a folder was read, as a warning of one line."""
    warnings.warn(message, stacklevel=4)

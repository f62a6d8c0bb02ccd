"""What jobs that were killed have left in a folder: hidden copies of files and folders that were not whole yet."""

from __future__ import annotations

import pathlib
import re
import shutil

from jaxalign import _locks

FILE = re.compile(r"\..+\.(json|jsonl|npz|npy|png|html|safetensors|blake2b)\.tmp")
"""Names under which `_io.whole_file` writes in run folders."""

FOLDER = re.compile(r"\..+\.tmp-(\d+)-\w+(\.old)?")
"""Names under which `whole_folder` of models writes, with the number of the process."""


def is_leftover(path: pathlib.Path) -> bool:
    """Whether a path has the name and the kind of a hidden copy that the library writes."""
    if path.is_symlink():
        return False
    return bool(FOLDER.fullmatch(path.name) if path.is_dir() else FILE.fullmatch(path.name))


def remove(out: pathlib.Path) -> None:
    """Removes the hidden copies in a run folder, of which this process has the lock, and in the folders inside it.

    In the run folder itself the lock says that nobody writes any more, also where another process has the number by
    now. A folder inside that has a lock of its own, and a copy there whose process lives, are another job's.

    Args:
      out: the run folder, which is known to be one of this run.
    """
    inside = [path for path in out.glob("*") if path.is_dir() and not path.is_symlink() and not is_leftover(path)]
    found = [path for path in out.glob(".*") if is_leftover(path)]
    for folder in inside:
        if not _locks.in_use(folder):
            found += [path for path in folder.glob(".*") if is_leftover(path) and not _is_written(path)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_written(path: pathlib.Path) -> bool:
    """Whether the process of a copy of a folder lives."""
    named = FOLDER.fullmatch(path.name)
    return named is not None and not _locks.is_gone(int(named[1]), None)

"""Looks for cases that a reader takes wrongly."""

from __future__ import annotations

import functools
import pathlib
import tempfile
import time
import warnings
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.changes import cases, changed
from tests.fuzz.readers import READERS

SECONDS = 20.0
"""No case may take longer: a size or a pipe in a file must not hang its reader."""


class Fault(NamedTuple):
    """A case that a reader takes wrongly."""

    reader: str
    """One of `READERS`."""
    case: dict[str, Any]
    """As a row of corpus.jsonl has it."""
    fault: str
    """What is wrong."""


class Found(NamedTuple):
    """What a search found."""

    cases: int
    """That were tried."""
    faults: list[Fault]
    """Those that were taken wrongly."""


def fault(reader: str, folder: pathlib.Path, case: dict[str, Any]) -> str | None:
    """What is wrong with how a reader takes a case; None where nothing is."""
    one, path = READERS[reader], folder / case["file"]
    original = path.read_bytes()
    made = changed(original, case)
    start = time.perf_counter()
    try:
        path.unlink()
        if made is not None:
            path.write_bytes(made)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.read(folder)
    except ValueError as error:
        text = str(error)
        if type(error).__name__ in ("UnicodeDecodeError", "JSONDecodeError", "UnicodeEncodeError"):
            return f"{type(error).__name__}: {error}"
        if "expected" not in text or "found" not in text:
            return f"no expected and found: {text:.300}"
        if str(folder) not in text:
            return f"no file: {text:.300}"
        if len(text) > 3000:
            return f"{len(text)} letters: {text:.300}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error!s:.300}"
    finally:
        path.write_bytes(original)
    seconds = time.perf_counter() - start
    return f"{seconds:.1f} seconds" if seconds > SECONDS else None


@functools.cache
def good_files(reader: str, root: pathlib.Path) -> pathlib.Path:
    folder = root / reader.replace(" ", "_")
    folder.mkdir()
    READERS[reader].make(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        READERS[reader].read(folder)  # the good files are taken
    return folder


def search(reader: str, root: pathlib.Path, count: int, *, number: int = 0, until: float = float("inf")) -> Found:
    """Gives a reader cases.

    Args:
      reader: one of `READERS`.
      root: folder for its files.
      count: how many cases.
      number: of the cases, which are others for each number.
      until: time after which no case begins.

    Returns:
      What was wrong.
    """
    folder, faults, done = good_files(reader, root), list[Fault](), [0]

    @settings(
        max_examples=count,
        derandomize=number == 0,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(READERS[reader].paths))
    def each(case: dict[str, Any]) -> None:
        if time.time() > until:
            return
        done[0] += 1
        found = fault(reader, folder, case)
        if found is not None:
            faults.append(Fault(reader, case, found))

    (each if number == 0 else seed(number)(each))()
    return Found(done[0], faults)


def search_part(reader: str, count: int, number: int, until: float) -> Found:
    """`search` in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        return search(reader, pathlib.Path(folder), count, number=number, until=until)

"""Files that are cut, flipped, or hold other values: each reader takes them, or raises its one documented error."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import time
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.changes import cases, changed
from tests.fuzz.readers import READERS

CORPUS = pathlib.Path(__file__).parent / "fuzz/corpus.jsonl"
SECONDS = 20.0
"""No case may take longer: a size or a pipe in a file must not hang its reader."""


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


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


def search(reader: str, root: pathlib.Path, count: int) -> None:
    """Looks for a case that a reader takes wrongly. With FUZZ_ROWS in the environment all faults are written there."""
    folder, rows = good_files(reader, root), os.environ.get("FUZZ_ROWS")

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(READERS[reader].paths))
    def each(case: dict[str, Any]) -> None:
        found = fault(reader, folder, case)
        if rows is not None and found is not None:
            with pathlib.Path(rows).open("a") as sink:
                sink.write(json.dumps({"reader": reader, "case": case, "fault": found}) + "\n")
            return
        assert found is None, found

    each()


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_a_file_or_raises_its_documented_error(reader, root):
    search(reader, root, 200)


@pytest.mark.nightly
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_a_file_or_raises_its_documented_error_at_length(reader, root):
    search(reader, root, 2000)


@pytest.mark.parametrize(
    "row", [json.loads(line) for line in CORPUS.read_text().splitlines()], ids=lambda r: r["reader"]
)
def test_a_case_that_was_once_taken_wrongly(row, root):
    assert fault(row["reader"], good_files(row["reader"], root), row["case"]) is None

"""Files that are cut, flipped, or hold other values: each reader takes them, or raises its one documented error."""

from __future__ import annotations

import json
import pathlib

import pytest

from tests.fuzz.readers import READERS
from tests.fuzz.search import fault, good_files, search

CORPUS = pathlib.Path(__file__).parent / "fuzz/corpus.jsonl"


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_a_file_or_raises_its_documented_error(reader, root):
    found = search(reader, root, 200)
    assert found.cases >= 150  # of the 200, hypothesis leaves out what is the same again
    assert not found.faults, found.faults[0]


@pytest.mark.nightly
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_a_file_or_raises_its_documented_error_at_length(reader, root):
    assert not (found := search(reader, root, 2000)).faults, found.faults[0]


@pytest.mark.parametrize(
    "row", [json.loads(line) for line in CORPUS.read_text().splitlines()], ids=lambda r: r["reader"]
)
def test_a_case_that_was_once_taken_wrongly(row, root):
    assert fault(row["reader"], good_files(row["reader"], root), row["case"]) is None

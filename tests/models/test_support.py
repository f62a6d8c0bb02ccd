"""The table of what is tested of each family is that of docs/models.md, and no family is without tests."""

from __future__ import annotations

import pytest

from jaxalign.models.hf.config import FAMILIES
from tests.models import support


def test_the_table_of_the_page_is_written_from_the_tests():
    page = support.PAGE.read_text()
    assert page == support.written(page), "python -m tests.models.support"


def test_every_family_is_loaded_decoded_saved_trained_and_adapted():
    for column in ("load", "decode", "save", "train", "LoRA"):
        assert support.families_of(support.COLUMNS[column]) == set(FAMILIES), column
    # transformers has no classifier of Granite to compare with.
    assert support.families_of(support.COLUMNS["reward"]) == set(FAMILIES) - {"granite"}


def test_the_page_says_what_each_family_has():
    for name in FAMILIES:
        assert f"| {name} | " in support.PAGE.read_text().split(support.START)[0], name


def test_a_family_that_a_test_leaves_out_is_not_in_its_column():
    def marked(*names):
        def test(name):
            """Stands for a test of these checkpoints."""

        return pytest.mark.parametrize("name", list(names))(test)

    assert support.families_of([marked("llama_yarn", "gemma2")]) == {"llama", "gemma2"}
    assert support.families_of([marked("llama_yarn", "gemma2"), marked("score")]) == {"llama"}

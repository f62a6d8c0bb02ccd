"""The table of docs/models.md: what is tested of each family. `python -m tests.models.support` writes it anew.

A cell is what the tests of that column are parametrised with: a family that a column leaves out has no test there.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from jaxalign.models.hf.config import FAMILIES
from tests.models import test_adapters, test_append, test_families, test_meshes, test_parity
from tests.models.make_adapters import CASES
from tests.models.make_golden import GOLDEN

PAGE = pathlib.Path(__file__).parents[2] / "docs/models.md"
START, END = "<!-- written by python -m tests.models.support -->", "<!-- end of the table -->"

COLUMNS: dict[str, tuple[Callable[..., Any], ...]] = {
    "load": (test_parity.test_parity_with_transformers,),
    "decode": (test_append.test_segments_over_a_cache_equal_the_full_forward_pass,),
    "save": (test_families.test_a_folder_goes_out_as_it_came_in,),
    "train": (test_families.test_a_training_step_moves_every_parameter,),
    "reward": (test_parity.test_a_reward_model_is_read_at_the_token_that_transformers_reads,),
    "LoRA": (
        test_adapters.test_an_adapters_folder_is_the_model_that_peft_makes_of_it,
        test_families.test_an_adapter_has_gradients_and_merged_equals_beside,
    ),
    "mesh": (test_meshes.test_a_family_on_a_mesh_gives_the_logits_of_one_device,),
}
"""Column -> the tests that must all have a case of a family."""


def cases(test: Callable[..., Any]) -> list[str]:
    """The names that a test is parametrised with."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize" and mark.args[0] == "name"]
    return [str(name) for mark in marks for name in mark.args[1]]


def family(name: str) -> str:
    """The model_type of a golden checkpoint, or of an adapter's base."""
    base = name if (GOLDEN / name).exists() else CASES[name].base
    return str(json.loads((GOLDEN / base / "config.json").read_text())["model_type"])


def families_of(tests: Iterable[Callable[..., Any]]) -> set[str]:
    """The families of which every one of these tests has a case."""
    return set.intersection(*({family(name) for name in cases(test)} for test in tests))


def table() -> str:
    """The table as Markdown."""
    held = {column: families_of(tests) for column, tests in COLUMNS.items()}
    lines = ["| model_type | " + " | ".join(held) + " |", "|---" * (1 + len(held)) + "|"]
    for name in FAMILIES:
        cells = ["yes" if name in found else "–" for found in held.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote {PAGE}")

"""The lines and files of run folders, checked before anything is computed of them: which field, expected and found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jaxalign._files import is_number, printed

Check: TypeAlias = tuple[Callable[[Any], bool], str]
"""Whether a value fits, and what is expected."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_known(value: Any) -> bool:
    return value is None or is_number(value)


RESPONSE: dict[str, Check] = {
    "method": (_is_text, "a name as method"),
    "beta": (_is_known, "a number or null as beta"),
    "index": (_is_count, "an index from 0"),
    "prompt": (_is_text, "a text as prompt"),
    "response": (_is_text, "a text as response"),
    "tokens": (lambda value: isinstance(value, list) and all(map(_is_count, value)), "a list of ids as tokens"),
    "kl": (is_number, "a finite kl"),
    "kl_kind": (_is_text, "a text as kl_kind"),
    "truncated": (lambda value: isinstance(value, bool), "true or false as truncated"),
}
"""Fields of a line of responses.jsonl that the report reads, and what they hold."""

SCORES: dict[str, Check] = {
    name: (is_number, f"a finite {name}") for name in ("gold", "second_gold", "reward", "forwards", "coherence")
} | {"log_prob_ref_sum": (_is_known, "a finite log_prob_ref_sum")}
"""Fields that it may have."""

INSPECTED: dict[str, Check] = {
    "method": RESPONSE["method"],
    "beta": RESPONSE["beta"],
    "index": RESPONSE["index"],
    "pieces": (
        lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
        "tokens as pieces",
    ),
}
"""Fields of a line of tokens.jsonl."""

SUMMARY: dict[str, Check] = {"method": RESPONSE["method"], "beta": RESPONSE["beta"]}
"""Fields of a row of summary.json of responses."""

SPEED: dict[str, Check] = {"tokens_per_second": (_is_known, "a number or null as tokens_per_second")}
"""A field that it may have."""


def check_line(
    values: Mapping[str, Any], needed: Mapping[str, Check], optional: Mapping[str, Check], *, where: str, row: int
) -> None:
    """Checks the fields of a line.

    Args:
      values: the line.
      needed: fields that it has.
      optional: fields that it may have.
      where: the file.
      row: the number of the line.

    Raises:
      ValueError: the file, the line, the field, what was expected and what was found.
    """
    lacking = [field for field in needed if field not in values]
    if lacking:
        raise ValueError(f"{where}: expected {', '.join(needed)} in each line, found no {lacking[0]} in {row}")
    for name, (fits, expected) in [*needed.items(), *optional.items()]:
        if name in values and not fits(values[name]):
            raise ValueError(f"{where}: expected {expected}, found {printed(values[name])} in line {row}")


def check_metrics(line: Mapping[str, Any], *, where: str, row: int) -> None:
    """Checks a line of metrics.jsonl: a step, and numbers by name; NaN is one, as of a run that diverged.

    Raises:
      ValueError: the file, the line, the field, what was expected and what was found.
    """
    if "step" not in line:
        raise ValueError(f"{where}: expected a step in each line, found none in {row}")
    for name, value in line.items():
        number = is_number(value) or (isinstance(value, float) and name != "step")
        if not number and (value is not None or name == "step"):
            raise ValueError(f"{where}: expected a number as {name}, found {printed(value)} in line {row}")


def check_object(values: Any, *, where: str, numbers: bool = False) -> None:
    """Checks that a file holds a JSON object; with `numbers`, one of numbers by name.

    Raises:
      ValueError: the file and what it holds.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object, found {printed(values)}")
    wrong = [name for name, value in values.items() if numbers and not is_number(value)]
    if wrong:
        raise ValueError(f"{where}: expected a number as {wrong[0]}, found {printed(values[wrong[0]])}")

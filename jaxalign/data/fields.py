"""The fields of a row: columns by name, and values of one type. RowErrors name the field and what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jaxalign._files import TwiceError, once_each
from jaxalign.data.rows import RowError, twice_row

PROMPTS = ("prompt", "instruction", "question")
"""The names under which rows have their prompt."""

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "response",
    "messages",
    "text",
    "system",
    "score",
    "score_chosen",
    "score_rejected",
    "label",
)
"""The fields that `columns` may name."""

RawRow: TypeAlias = Mapping[str, Any]
"""A row as the file has it."""


def parse_columns(text: str) -> dict[str, str]:
    """The columns of a command line.

    Args:
      text: "prompt=FIELD,chosen=FIELD,…"; a FIELD with dots goes into fields and lists: "info.post", "answers.0.text".

    Returns:
      Field of COLUMNS -> field of the files. {} for "".

    Raises:
      ValueError: another form, or a name that is none of COLUMNS.
    """
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, field = (each.strip() for each in part.partition("="))
        if not equals or not field or name in found:
            raise ValueError(f"columns: expected prompt=FIELD,chosen=FIELD,…, found {text!r}")
        found[name] = field
    return check_columns(found)


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The columns themselves. ValueError for a name that is none of COLUMNS."""
    for name in columns or {}:
        if name not in COLUMNS:
            raise ValueError(f"columns: expected names among {', '.join(COLUMNS)}, found {name!r}")
    return dict(columns or {})


def rename(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    """The row under the names of COLUMNS.

    Fields whose names columns give elsewhere go. Where columns name a response, messages or a text, of the other fields
    only a prompt and a system text stay, so that the row has no second form; else all others do.
    """
    if not columns:
        return row
    named = {name: _at(row, path) for name, path in columns.items()}
    hidden = set(PROMPTS) if named.keys() & {"prompt", "messages", "text"} else set()
    kept = {*PROMPTS, "system"} if named.keys() & {"response", "messages", "text"} else set(row)
    return {name: value for name, value in row.items() if name in kept - hidden} | named


def _at(row: RawRow, path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, Sequence) and not isinstance(value, str) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            value = None
        if value is None:
            raise RowError(
                "column not there", f"expected the field {path} of columns, found fields {sorted(row)!r:.500}"
            )
    return value


# Values ---------------------------------------------------------------------------------------------------------------


def string_in(row: RawRow, name: str, before: str = "") -> str:
    """A field that holds text. before: the path to the row, for errors."""
    value = row.get(name)
    if not isinstance(value, str):
        found = "no such field" if value is None else type(value).__name__
        raise RowError("type", f"expected text in {before}{name}, found {found}")
    return value


def list_in(row: RawRow, name: str) -> Any:
    """A field that holds a list; tables hold it as JSON."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            return json.loads(value, object_pairs_hook=once_each)
        except TwiceError as error:
            raise twice_row(error) from None
        except ValueError as error:
            raise RowError("type", f"expected a list in {name}, found text that is no JSON ({error})") from error
    return value


def dicts_in(row: RawRow, name: str) -> list[RawRow]:
    """A field that holds a list of rows, at least one."""
    value = list_in(row, name)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, Mapping) for each in value):
        raise RowError("type", f"expected a list of fields in {name}, found {type(value).__name__}")
    return list(value)


def number_in(value: Any, name: str) -> float:
    """A finite number; tables hold it as text."""
    try:
        found = float("nan" if isinstance(value, bool) or value is None else value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if found - found != 0:  # NaN and infinity
        raise RowError("score", f"expected a finite number in {name}, found {value!r:.200}")
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a number, or text that stands for one; NaN and infinity are numbers here."""
    try:
        return isinstance(value, int) or isinstance(float(value), float)
    except (TypeError, ValueError):
        return False


def truth_in(row: RawRow, name: str, kind: str) -> bool | None:
    """A field that holds true or false, 1 or 0; tables hold them as text.

    Args:
      row: the row.
      name: of the field.
      kind: of the RowError.

    Returns:
      None where the row has no such field.

    Raises:
      RowError: another value.
    """
    value = row.get(name)
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "1", "1.0"):
        return True
    if word in (False, "false", "0", "0.0"):
        return False
    if word is not None:
        raise RowError(kind, f"expected true or false in {name}, found {value!r:.200}")
    return None


def label_in(row: RawRow, name: str, allowed: Sequence[int]) -> float:
    """A field that holds one of a few whole numbers."""
    found = number_in(row.get(name), name)
    if found not in allowed:
        raise RowError("label", f"expected a label among {list(allowed)} in {name}, found {row.get(name)!r:.200}")
    return found

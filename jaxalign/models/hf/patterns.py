"""The regular expressions of an adapter: how they are matched, and which of them would take time without end."""

from __future__ import annotations

import collections
import math
import pathlib
import re
from typing import Any

MOST_REPEATS = 5
"""Names have some 60 letters, and the time to match is that number to the power of the repeats in a row."""

WAYS = 16
"""In how many ways one repeat counts. Five in a row share a name's letters, which leaves them no more than optional
parts and alternatives of as many ways in all: some millions of steps."""

LETTERS = 64
"""Of an alternative's beginning that are compared with the others'."""


def key_pattern(key: str) -> str:
    """The expression by which a key of rank_pattern or alpha_pattern is matched with a module's name."""
    return rf"(.*\.)?({key})$"


def layers_pattern(pattern: str) -> str:
    """The expression by which a layers_pattern is matched; its last group is the layer's number."""
    return rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\."


def check_pattern(name: str, pattern: str, used: str, file: pathlib.Path) -> None:
    """Checks a regular expression of an adapter.

    Args:
      name: of its field.
      pattern: as the field has it.
      used: the expression that is matched, which holds it.
      file: named in messages.

    Raises:
      ValueError: what is no regular expression, or one whose time may grow exponentially with a name's length.
    """
    try:
        re.compile(pattern)
        re.compile(used)
        ways = _ways(re._parser.parse(pattern))  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name}: expected a regular expression in {file}, found {pattern!r:.200} ({error})"
        ) from error
    if ways > WAYS**MOST_REPEATS:
        raise ValueError(
            f"{name}: expected a regular expression of at most {MOST_REPEATS} repeats, none within another, and few "
            f"optional parts and alternatives, in {file}, found {pattern!r:.200}"
        )


def _ways(parsed: Any) -> float:
    """In how many ways a parsed expression may match from one letter on, at most; they are tried one by one."""
    return math.prod(_ways_of(str(code), argument) for code, argument in parsed)


def _ways_of(code: str, argument: Any) -> float:
    parts = [part for part in _parts(argument) if hasattr(part, "data")]
    inner = [_ways(part) for part in parts]
    if code == "BRANCH":
        return _alternatives(parts, inner)
    within: float = math.prod(inner)
    if not code.endswith("REPEAT"):
        return within
    least, most = int(argument[0]), int(argument[1])
    if most > 1:
        return math.inf if within > 1 else min(most - least + 1, WAYS)
    return most - least + within


def _alternatives(parts: list[Any], inner: list[float]) -> float:
    """The ways of those alternatives that can match at one place: there, each begins with the beginning of another."""
    ways: dict[str, float] = collections.defaultdict(float)
    for part, own in zip(parts, inner, strict=True):
        ways[_beginning(part)] += own
    return max(sum(ways.get(one[:end], 0.0) for end in range(len(one) + 1)) for one in ways)


def _beginning(parsed: Any) -> str:
    """The letters that an alternative begins with, whatever their case."""
    found = ""
    for code, argument in parsed:
        if str(code) != "LITERAL" or len(found) >= LETTERS:
            break
        found += chr(argument).casefold()
    return found[:LETTERS]


def _parts(argument: Any) -> list[Any]:
    """What an operation of an expression holds, lists and tuples opened."""
    if isinstance(argument, list | tuple):
        return [part for one in argument for part in _parts(one)]
    return [argument]

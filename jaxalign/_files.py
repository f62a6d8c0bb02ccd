"""Files that others wrote: read whole, as text or JSON, with errors that name the file.

A pipe in the place of a file would wait for its other end, and a file of another kind raise whatever its reader does.
"""

from __future__ import annotations

import collections
import json
import pathlib
import stat
from typing import Any

MOST_BYTES = 1 << 30
"""The largest text that is read whole."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
)


def check_regular(path: pathlib.Path) -> None:
    """Checks that a path is a file, a link to one included.

    Args:
      path: what is to be opened.

    Raises:
      ValueError: it is something else, or nothing.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: expected a file that can be read, found {_words(error)} at {path}") from error
    if not stat.S_ISREG(mode):
        kind = next((what for test, what in _KINDS if test(mode)), "another thing")
        raise ValueError(f"{path.name}: expected a file, found {kind} at {path}")


def read_text(path: pathlib.Path) -> str:
    """Reads a text in UTF-8, with or without a byte order mark.

    Args:
      path: the file.

    Returns:
      The text, its line ends as they are.

    Raises:
      ValueError: no file, one that cannot be read, of more than MOST_BYTES, or in another encoding.
    """
    check_regular(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"{path.name}: expected at most {MOST_BYTES} bytes, found {size} in {path}")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path.name}: expected a file that can be read, found {_words(error)} at {path}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: expected UTF-8, found {error} in {path}") from error


class TwiceError(ValueError):
    """An object of JSON has a field twice, of which Python would drop the first."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r:.200} twice")


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object, as `object_pairs_hook` of `json.loads`.

    Args:
      pairs: names and values.

    Returns:
      The object.

    Raises:
      TwiceError: a name stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise TwiceError(collections.Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def parse_json(text: str, where: str) -> Any:
    """Reads JSON.

    Args:
      text: the JSON.
      where: the file, for errors, and what else tells the place.

    Returns:
      Its value.

    Raises:
      ValueError: what is no JSON, is nested too deeply for Python, or has a field twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=once_each)
    except TwiceError as error:
        raise ValueError(f"{where}: expected JSON with each field once, found {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, found {error}") from error


def printed(value: Any) -> str:
    """Writes a value for a message.

    Args:
      value: whatever a file held.

    Returns:
      At most 200 letters; an integer of thousands of digits, which Python writes no text of, by its size.
    """
    try:
        return f"{value!r:.200}"
    except (ValueError, RecursionError):
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__


def is_number(value: Any) -> bool:
    """Tells whether a value of a JSON file is a number to compute with.

    Args:
      value: the value.

    Returns:
      True for integers and floats that are finite, also when they are squared and summed; not for true and false.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

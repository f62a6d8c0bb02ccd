"""Options that every job has, taken out of a command line before the job's own are read."""

from __future__ import annotations

from collections.abc import Sequence


def take_word(arguments: Sequence[str], word: str) -> tuple[list[str], list[str]]:
    """Takes an option that every job has out of a command line, before the job's own are read.

    Args:
      arguments: words of a command line.
      word: the option, as --name, which stands there as `--name VALUE` or `--name=VALUE`.

    Returns:
      (its values in order, "" for one that is missing; the other words).
    """
    found, rest, words = list[str](), list[str](), iter(arguments)
    for each in words:
        name, equals, value = each.partition("=")
        if name == word:
            found.append(value if equals else next(words, ""))
        else:
            rest.append(each)
    return found, rest

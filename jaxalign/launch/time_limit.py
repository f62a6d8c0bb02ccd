"""How long one call of a user's program may take in a job: the word --reward-timeout of every command."""

from __future__ import annotations

from collections.abc import Sequence

from jaxalign import _time_limits
from jaxalign._words import take_word

WORD = "--reward-timeout"
DEFAULT = 3600.0
"""Seconds of a job without the word: a program that has not answered within an hour does not answer."""


def take(arguments: Sequence[str]) -> tuple[float, list[str]]:
    """Takes the word about the time of programs out of a command line.

    Args:
      arguments: --reward-timeout SECONDS among others.

    Returns:
      (seconds, the other words); DEFAULT where there is none.

    Raises:
      ValueError: the word without a finite number >= 0.
    """
    seconds = DEFAULT
    values, rest = take_word(arguments, WORD)
    for text in values:
        try:
            seconds = float(text)
        except ValueError:
            raise ValueError(f"reward-timeout: expected {WORD} SECONDS, found {text or 'none'!r}") from None
        _time_limits.check_seconds(seconds, "reward-timeout")
    return seconds, rest


def start(seconds: float) -> None:
    """Gives programs that much time from here on.

    Args:
      seconds: of one call; 0: no limit.
    """
    _time_limits.set_default(seconds)

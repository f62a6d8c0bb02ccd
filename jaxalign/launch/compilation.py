"""A folder in which compiled programs are kept from one start to the next, and the count of those found there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign._words import take_word

WORD = "--compilation-cache"
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}


class Counts(NamedTuple):
    """Programs of a process."""

    folder: str
    """Of the cache, "" for none."""
    hits: int
    """Programs that were read from it."""
    misses: int
    """Programs that were compiled and written to it, where that took long enough to be worth keeping."""


_counted = {"hits": 0, "misses": 0}
_listening = False


def take(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Takes the word about the cache out of a command line.

    Args:
      arguments: --compilation-cache DIR among others, or JAX_COMPILATION_CACHE_DIR in the environment.

    Returns:
      (folder, the other words); "" where there is none.

    Raises:
      ValueError: the word without a folder.
    """
    values, rest = take_word(arguments, WORD)
    folder = os.environ.get(VARIABLE, "")
    for folder in values:
        if not folder or folder.startswith("--"):
            raise ValueError(f"compilation-cache: expected {WORD} DIR, found {folder or 'none'!r}")
    return folder, rest


def start(folder: str) -> None:
    """Keeps compiled programs in a folder from here on, and counts them.

    Args:
      folder: made where it is missing; "" for none.
    """
    global _listening
    if not folder:
        return
    import jax.monitoring  # a command line that asks for help does not load it

    jax.config.update("jax_compilation_cache_dir", folder)
    _counted.update(hits=0, misses=0)
    if not _listening:
        jax.monitoring.register_event_listener(_count)
        _listening = True


def _count(event: str, **_: str | int) -> None:
    if event in EVENTS:
        _counted[EVENTS[event]] += 1


def counts(folder: str) -> Counts:
    """What the cache of a folder has given since `start`."""
    return Counts(folder, **_counted)


def tell(folder: str) -> None:
    """Says on stderr how many programs came from the cache, where there is one and jax has run."""
    found = counts(folder)
    if folder and found.hits + found.misses and "jax" in sys.modules:
        print(f"compilation cache {folder}: {found.hits} programs read, {found.misses} compiled", file=sys.stderr)

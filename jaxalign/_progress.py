"""The progress line of a long job."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from jaxalign import _hosts


class _Stream:
    """A stream whose errors end no job: a progress line that cannot be written is left out."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Lines(_Stream):
    """A stream that ends each of tqdm's redrawn lines: a pipe or a log file keeps them all."""

    def write(self, text: str) -> None:
        text = text.replace("\r", "\n")
        if text.strip():
            super().write(text.strip("\n") + "\n")


def progress(stage: str, total: int, *, initial: int = 0, unit: str = "it", shown: bool = True) -> Any:
    """A tqdm bar on stderr: stage, count, rate and ETA. Redrawn on a terminal; elsewhere a line a minute.
    Of several processes the first shows its own; none where it is not to be shown."""
    from tqdm import tqdm  # a bar alone needs it: importing the library does not load it

    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        total=total,
        disable=not (shown and _hosts.is_first() and sys.stderr is not None),
        initial=initial,
        desc=stage,
        unit=unit,
        mininterval=0.2 if terminal else 60.0,
        maxinterval=10.0 if terminal else 60.0,
        file=(_Stream if terminal else _Lines)(sys.stderr),
        ascii=not terminal,
        ncols=None if terminal else 110,
        dynamic_ncols=terminal,
    )

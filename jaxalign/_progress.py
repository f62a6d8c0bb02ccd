"""The progress line of a long job."""

from __future__ import annotations

import sys
from typing import Any

from jaxalign import _hosts


class _Lines:
    """A stream that ends each of tqdm's redrawn lines: a pipe or a log file keeps them all."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.replace("\r", "\n")
        if text.strip():
            self.stream.write(text.strip("\n") + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(stage: str, total: int, *, initial: int = 0, unit: str = "it", shown: bool = True) -> Any:
    """A tqdm bar on stderr: stage, count, rate and ETA. Redrawn on a terminal; elsewhere a line a minute.
    Of several processes the first shows its own; none where it is not to be shown."""
    from tqdm import tqdm  # a bar alone needs it: importing the library does not load it

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        disable=not (shown and _hosts.is_first()),
        initial=initial,
        desc=stage,
        unit=unit,
        mininterval=0.2 if terminal else 60.0,
        maxinterval=10.0 if terminal else 60.0,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        ascii=not terminal,
        ncols=None if terminal else 110,
        dynamic_ncols=terminal,
    )

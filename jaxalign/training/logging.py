"""Metrics of a run as JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxalign import _hosts


class MetricWriter:
    """Writes metrics.jsonl and tensorboard/ in a run folder: one line and one event per call of `write`. Of
    several processes the first writes.

    Args:
      folder: the run folder.
      step: steps that were taken before. Lines after them are dropped, so that a resumed run holds each step once; so
        does TensorBoard.
    """

    def __init__(self, folder: pathlib.Path, *, step: int):
        self._writes = _hosts.is_first()
        with _hosts.together():
            if self._writes:
                self._open(folder, step)

    def _open(self, folder: pathlib.Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) is not None and (_step_of(line) or 0) <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if lines else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step.

        Args:
          step: the number of steps taken.
          metrics: finite numbers by name.
        """
        with _hosts.together():
            if self._writes:
                self._write(step, metrics)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file."""
        if not self._writes:
            return
        self._file.close()
        self._events.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _step_of(line: str) -> int | None:
    """None for a line that was cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def read(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]

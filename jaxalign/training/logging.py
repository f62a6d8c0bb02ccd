"""Metrics of a run as JSON lines, and in a tracker."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxalign import _hosts, _io
from jaxalign.training import tracking


class MetricWriter:
    """Writes metrics.jsonl in a run folder, and gives the same numbers to a tracker: one line and one event per call of
    `write`. Of several processes the first writes.

    Args:
      folder: the run folder.
      step: steps that were taken before. Lines after them are dropped, so that a resumed run holds each step once; so
        does TensorBoard.
      track: "tensorboard" (tensorboard/ in the folder), "wandb", "trackio" or "none".

    Raises:
      ValueError: the tracker's library is not installed.
    """

    def __init__(self, folder: pathlib.Path, *, step: int, track: str = "tensorboard"):
        self._writes = _hosts.is_first()
        with _hosts.together():
            if self._writes:
                self._open(folder, step, track)

    def _open(self, folder: pathlib.Path, step: int, track: str) -> None:
        self.path = folder / "metrics.jsonl"
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        steps = [_step_of(line) for line in lines]
        if odd := steps[:-1].count(None):  # the last one may be cut short
            print(f"{self.path.name}: {odd} lines that hold no step are left out of {self.path}", flush=True)
        with _io.whole_file(self.path) as sink:
            for line, at in zip(lines, steps, strict=True):
                sink.write(line + b"\n" if at is not None and at <= step else b"")
        self._file = self.path.open("a")
        self._tracker = tracking.open_tracker(track, folder, step=step, resumed=lines != [b""])

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
        if self._tracker is not None:
            self._tracker.write(step, metrics)

    def close(self) -> None:
        """Closes the file and the tracker."""
        if not self._writes:
            return
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _step_of(line: bytes) -> int | None:
    """The step of a line; None for one that is damaged."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def read(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl. ValueError for one that holds no JSON object, by its number."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            values = json.loads(line.decode())
            if not isinstance(values, dict):
                raise ValueError(f"a JSON {type(values).__name__}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name}: expected a JSON object in line {number}, found {error} in {path}") from None
        found.append(values)
    return found

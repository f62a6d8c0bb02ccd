"""Where the metrics of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, or nowhere."""

from __future__ import annotations

import importlib
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jaxalign import _io

Track = Literal["tensorboard", "wandb", "trackio", "none"]
PROJECT = "jaxalign"
"""The project that runs of wandb and trackio are listed under, where WANDB_PROJECT or TRACKIO_PROJECT name no other."""


class Tracker(NamedTuple):
    """Takes the metrics of a run."""

    write: Callable[[int, Mapping[str, float]], None]
    """(step, finite numbers by name)."""
    close: Callable[[], None]
    """Ends the run there."""


def check_track(track: str) -> None:
    """Checks that the library behind a tracker is installed.

    Args:
      track: one of `Track`.

    Raises:
      ValueError: another name, or a library that is not installed, with the command that installs it.
    """
    if track not in ("tensorboard", "wandb", "trackio", "none"):
        raise ValueError(f"track: expected tensorboard, wandb, trackio or none, found {track!r}")
    if track in ("wandb", "trackio"):
        _library(track)


def open_tracker(track: str, folder: pathlib.Path, *, step: int, resumed: bool) -> Tracker | None:
    """Opens a run of the tracker, or goes on with that of the folder.

    Args:
      track: one of `Track`.
      folder: the run folder; config.json in it becomes the run's config, and its last two names the run's name.
        tracking.json keeps that name and an id, by which an interrupted run is gone on with.
      step: steps that were taken before.
      resumed: whether the folder holds metrics of an earlier start.

    Returns:
      The tracker; None for "none".
    """
    check_track(track)
    if track == "none":
        return None
    if track == "tensorboard":
        return _tensorboard(folder, step + 1 if resumed else None)
    kept = folder / "tracking.json"
    known = _io.read_json(kept, then="remove that file: a new run begins there") if kept.exists() else {}
    if known.get("track") != track:
        known = {"track": track, "name": "/".join(folder.resolve().parts[-2:]), "id": uuid.uuid4().hex[:12]}
        _io.write_json(kept, known)
    stored = folder / "config.json"
    config = _io.read_json(stored, then="the run folder is damaged") if stored.exists() else {}
    return (_wandb if track == "wandb" else _trackio)(folder, known, config)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"track: expected {name} to be installed (python -m pip install {name}), found {error}"
        ) from None


def _tensorboard(folder: pathlib.Path, purge_step: int | None) -> Tracker:
    from tensorboardX import SummaryWriter

    events = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            events.add_scalar(name, value, step)

    return Tracker(write, events.close)


def _wandb(folder: pathlib.Path, known: dict[str, str], config: dict[str, Any]) -> Tracker:
    options: dict[str, Any] = {"name": known["name"], "id": known["id"], "resume": "allow", "dir": str(folder)}
    run = _library("wandb").init(project=os.environ.get("WANDB_PROJECT") or PROJECT, config=config, **options)
    run.define_metric("*", step_metric="step")  # steps that are taken again after a kill are drawn over the former ones
    return Tracker(lambda step, metrics: run.log({"step": step, **metrics}), run.finish)


def _trackio(folder: pathlib.Path, known: dict[str, str], config: dict[str, Any]) -> Tracker:
    library, name = _library("trackio"), f"{known['name']}-{known['id']}"  # trackio goes on with a run by its name
    project = os.environ.get("TRACKIO_PROJECT") or PROJECT
    library.init(project=project, name=name, resume="allow", config=config, embed=False)
    return Tracker(lambda step, metrics: library.log(dict(metrics), step=step), library.finish)

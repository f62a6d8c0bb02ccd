"""What run folders hold for the report: responses, training curves, options and versions."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign._files import parse_json, read_text
from jaxalign.evaluation.report import checks
from jaxalign.evaluation.results import Key, Record

PASSED_OVER = {"model", "checkpoints", "tensorboard", "wandb", "states", "data"}
"""Folders inside a run that hold no responses and no metrics."""


class Decoded(NamedTuple):
    """A folder with responses."""

    path: pathlib.Path
    """The folder."""
    records: list[Record]
    """The lines of responses.jsonl, or of its partial files."""
    options: dict[str, Any] | None
    """config.json; None without one."""
    versions: dict[str, str] | None
    """versions.json; None without one."""
    speeds: dict[Key, float | None]
    """Tokens/s of each method and strength, of summary.json."""
    tokens: list[Record]
    """The lines of tokens.jsonl, which --inspect writes."""


class Trained(NamedTuple):
    """A folder with training metrics."""

    path: pathlib.Path
    """The folder."""
    name: str
    """Its path inside the run folder."""
    lines: list[dict[str, float]]
    """The lines of metrics.jsonl."""
    summary: dict[str, Any]
    """summary.json; {} while the run is not finished."""
    options: dict[str, Any] | None
    """config.json; None without one."""
    versions: dict[str, str] | None
    """versions.json; None without one."""


class Run(NamedTuple):
    """A run folder."""

    name: str
    """What tells it from the other runs of the report."""
    path: pathlib.Path
    """The folder."""
    decoded: list[Decoded]
    """Its folders with responses."""
    trained: list[Trained]
    """Its folders with metrics, in the order in which they were begun."""
    options: dict[str, Any] | None
    """Its own config.json; None without one."""
    seconds: dict[str, float]
    """Stage -> seconds, of timings.json."""
    notes: list[str]
    """What is missing or unfinished, a sentence each."""


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Reads run folders and every run inside them.

    Args:
      folders: folders that hold, at any depth, responses.jsonl or metrics.jsonl.

    Returns:
      A Run per folder, under the shortest names that tell them apart.

    Raises:
      ValueError: no folder, one that does not exist, that is given twice, or holds neither responses nor metrics; a
        file whose lines are not as these jobs write them (the file and the line are named).
    """
    paths = [pathlib.Path(folder) for folder in folders]
    if not paths:
        raise ValueError("runs: expected at least one run folder, found none")
    for i, path in enumerate(paths):
        if not path.is_dir():
            raise ValueError(f"runs: expected a run folder, found {'a file' if path.exists() else 'nothing'} at {path}")
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise ValueError(f"runs: expected each folder once, found {path} twice")
    return [_read_run(name, path) for name, path in zip(_names(paths), paths, strict=True)]


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The last parts of each path, as many as tell it from the others."""
    parts = [path.resolve().parts for path in paths]

    def named(own: tuple[str, ...]) -> str:
        size = next(n for n in range(1, len(own) + 1) if sum(p[-n:] == own[-n:] for p in parts) == 1)
        return "/".join(own[-size:])

    return [named(own) for own in parts]


def _read_run(name: str, path: pathlib.Path) -> Run:
    notes: list[str] = []
    decoded, trained = [], []
    for folder in _folders(path):
        inside = folder.relative_to(path).as_posix()
        if found := sorted(folder.glob("responses.jsonl*")):
            decoded.append(_read_decoded(folder, inside, found, notes))
        if (folder / "metrics.jsonl").exists():
            trained.append(_read_trained(folder, inside, notes))
    if not decoded and not trained:
        raise ValueError(f"runs: expected responses.jsonl or metrics.jsonl in {path}, found neither, at any depth")
    _check_once(decoded)
    trained.sort(key=lambda run: _begun(run.path))
    seconds = _object(path / "timings.json", numbers=True) or {}
    return Run(name, path, decoded, trained, _object(path / "config.json"), seconds, notes)


def _check_once(decoded: Sequence[Decoded]) -> None:
    """ValueError where two folders of a run answer by one method at one setting: their means would be of both."""
    found: dict[Key, pathlib.Path] = {}
    for part in decoded:
        for method, beta in dict.fromkeys((record["method"], record["beta"]) for record in part.records):
            before = found.setdefault((method, beta), part.path)
            if before != part.path:
                setting = "" if beta is None else f" at {beta:g}"
                raise ValueError(
                    f"runs: expected each method and setting in one folder of a run, found {method}{setting} in "
                    f"{before} and in {part.path}; folders of other runs are given one by one"
                )


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for here, below, _ in os.walk(path):
        below[:] = sorted(name for name in below if name not in PASSED_OVER and not name.startswith("."))
        found.append(pathlib.Path(here))
    return found


def _begun(folder: pathlib.Path) -> float:
    """When the run of a folder began: a run writes its versions first and once."""
    stamp = folder / "versions.json"
    return (stamp if stamp.exists() else folder / "metrics.jsonl").stat().st_mtime


def _read_decoded(folder: pathlib.Path, inside: str, files: Sequence[pathlib.Path], notes: list[str]) -> Decoded:
    whole = folder / "responses.jsonl"
    records: dict[tuple[Any, ...], Record] = {}
    scored: dict[Key, set[str]] = {}
    for path in [whole] if whole.exists() else files:
        for row, record in enumerate(_lines(path), start=1):
            checks.check_line(record, checks.RESPONSE, checks.SCORES, where=str(path), row=row)
            key, scores = (record["method"], record["beta"]), {name for name in checks.SCORES if name in record}
            if scored.setdefault(key, scores) != scores:
                raise ValueError(
                    f"{path}: expected {sorted(scored[key])} as of the lines before, found {sorted(scores)} in {row}"
                )
            records[record["method"], record["beta"], record["index"]] = record
    if not whole.exists():
        notes.append(
            f"{inside}: decoding was not finished; the page shows the {len(records)} responses that are there."
        )
    rows = _json(folder / "summary.json")
    if rows is None and whole.exists():
        notes.append(f"{inside}: there is no summary.json, so that tokens per second are not known.")
    if rows is not None and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f"{folder / 'summary.json'}: expected a list of rows, found {type(rows).__name__}")
    for number, line in enumerate(rows or [], start=1):
        checks.check_line(line, checks.SUMMARY, checks.SPEED, where=str(folder / "summary.json"), row=number)
    speeds = {(row["method"], row["beta"]): row.get("tokens_per_second") for row in rows or []}
    inspected = folder / "tokens.jsonl"
    options = _object(folder / "config.json")
    if options is None:
        notes.append(f"{inside}: there is no config.json, so that its command is not known.")
    tokens = _lines(inspected) if inspected.exists() else []
    for row, line in enumerate(tokens, start=1):
        checks.check_line(line, checks.INSPECTED, {}, where=str(inspected), row=row)
    return Decoded(folder, list(records.values()), options, _object(folder / "versions.json"), speeds, tokens)


def _read_trained(folder: pathlib.Path, inside: str, notes: list[str]) -> Trained:
    path = folder / "metrics.jsonl"
    lines = _lines(path)
    for row, line in enumerate(lines, start=1):
        checks.check_metrics(line, where=str(path), row=row)
    summary = _object(folder / "summary.json")
    if summary is None:
        notes.append(
            f"{inside}: training was not finished; the curve ends at step {lines[-1]['step'] if lines else 0}."
        )
    return Trained(
        folder,
        folder.name if inside == "." else inside,
        lines,
        summary or {},
        _object(folder / "config.json"),
        _object(folder / "versions.json"),
    )


def _json(path: pathlib.Path) -> Any:
    """A JSON file; None where there is none."""
    return parse_json(read_text(path), str(path)) if path.exists() else None


def _object(path: pathlib.Path, *, numbers: bool = False) -> dict[str, Any] | None:
    """A JSON file that holds an object; None where there is none."""
    if not path.exists():
        return None
    values: dict[str, Any] = _json(path)
    checks.check_object(values, where=str(path), numbers=numbers)
    return values


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last line without its end was cut short and is left out."""
    found = []
    for row, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected a JSON object in line {row}, found {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}: expected a JSON object in line {row}, found a {type(value).__name__}")
        found.append(value)
    return found

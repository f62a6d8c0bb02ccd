"""The page: HTML with all numbers in it, styles and scripts inline, nothing fetched."""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import importlib.resources
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from jaxalign import _io
from jaxalign._version import __version__
from jaxalign.evaluation.report import sections
from jaxalign.evaluation.report.folders import Run, read_runs
from jaxalign.evaluation.report.numbers import Table, gather
from jaxalign.evaluation.report.payload import payload

SCRIPTS = ("dom.js", "charts.js", "figures.js", "tables.js", "responses.js", "tokens.js", "main.js")


class Command(Protocol):
    """The command line that a run folder's options stand for; None where no job has these options."""

    def __call__(self, options: dict[str, Any], /) -> str | None: ...


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    prompts: int = 200,
    command: Command | None = None,
) -> list[str]:
    """Writes one self-contained HTML page about run folders.

    Args:
      folders: run folders, which hold responses.jsonl or metrics.jsonl at any depth.
      path: of the page.
      title: its heading; "": the names of the folders.
      prompts: how many prompts' responses it holds; the numbers are of all prompts in any case.
      command: gives the command of a folder's options; None: the options themselves are shown.

    Returns:
      What is missing, unfinished or left out, a sentence each; the page shows them too.

    Raises:
      ValueError: prompts below 0, and those of `folders.read_runs`.
    """
    if prompts < 0:
        raise ValueError(f"prompts: expected at least 0, found {prompts}")
    runs = read_runs(folders)
    table = gather(runs)
    data, left_out = payload(runs, table, prompts)
    notes = [f"{run.name}/{note}" if len(runs) > 1 else note for run in runs for note in run.notes] + left_out
    notes += _different_rewards(runs)
    text = render(runs, table, data, title=title or ", ".join(run.name for run in runs), notes=notes, command=command)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _io.whole_file(path) as sink:
        sink.write(text.encode("utf-8", "replace"))  # half a surrogate pair has no UTF-8
    return notes


def render(
    runs: Sequence[Run],
    table: Table,
    data: dict[str, Any],
    *,
    title: str,
    notes: Sequence[str],
    command: Command | None = None,
) -> str:
    """The page's text.

    Args:
      runs, table: what it is about.
      data: as `payload.payload` gives it.
      title: the heading.
      notes: sentences on what is missing.
      command: as in `write_report`.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = [part for part in sections.build(runs, table, data, notes=notes, command=command) if part.body]
    links = "".join(f'<a href="#{part.name}">{html.escape(part.link)}</a>' for part in parts)
    body = "".join(
        f'<section id="{part.name}" aria-labelledby="{part.name}-title">'
        f'<h2 id="{part.name}-title">{html.escape(part.title)}</h2>{part.body}</section>\n'
        for part in parts
    )
    made = f"{datetime.date.today().isoformat()} · jaxalign {__version__}"
    fields = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        "style": _asset("page.css"),
        "lead": sections.lead(table),
        "counts": html.escape(sections.counts(runs, table)),
        "made": html.escape(made),
        "links": links,
        "body": body,
        "data": as_json(data),
        "script": script,
    }
    page = _asset("page.html")
    pieces = page.split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:  # one pass: what is put in is not read again
        name, _, rest = piece.partition("}}")
        out += [fields[name], rest]
    return "".join(out)


def as_json(data: Any) -> str:
    """JSON that may stand in a script element: no character of it is markup, and what is no number is null."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A surrogate without its other half, as JSON may hold, has no UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _asset(name: str) -> str:
    return (importlib.resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _different_rewards(runs: Sequence[Run]) -> list[str]:
    """A sentence where runs were scored by different rewards."""
    found = []
    for name, words in (("gold", "gold"), ("reward", "proxy")):
        used = {str(part.options.get(name, "")) for run in runs for part in run.decoded if part.options}
        if len(used) > 1:
            found.append(f"The {words} is not the same in all runs ({', '.join(sorted(used))}): compare within a run.")
    return found

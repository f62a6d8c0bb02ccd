"""The sections of the page: a sentence, a place for each figure, and the tables behind them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from jaxalign.evaluation.report import tables
from jaxalign.evaluation.report.folders import Run
from jaxalign.evaluation.report.numbers import Table
from jaxalign.evaluation.report.tables import number, plus_minus

MEASURES = {"gold": "gold", "reward": "proxy"}


class Section(NamedTuple):
    """A part of the page."""

    name: str
    """Its anchor."""
    link: str
    """Its name in the navigation."""
    title: str
    """Its heading."""
    body: str
    """HTML; "" leaves the section out."""


class _Command(Protocol):
    def __call__(self, options: dict[str, Any], /) -> str | None: ...


def build(
    runs: Sequence[Run], table: Table, data: dict[str, Any], *, notes: Sequence[str], command: _Command | None
) -> list[Section]:
    """All sections in order; those that these runs have nothing for are empty."""
    return [
        Section("frontier", "Frontier", "Reward against KL", _frontier(table)),
        Section("methods", "Methods", "Methods and what they cost", _methods(table)),
        Section("wins", "Win rates", "Who wins against whom", _wins(table)),
        Section("overoptimisation", "Over-optimisation", "Over-optimisation", _over(table, data)),
        Section("responses", "Responses", "Responses side by side", _responses(table, data)),
        Section("tokens", "Tokens", "Token by token", _tokens(table, data)),
        Section("training", "Training", "Training", _training(runs, data)),
        Section("provenance", "How it was made", "How this was made", _provenance(runs, notes, command)),
    ]


def lead(table: Table) -> str:
    """The first sentence: which method is best, beside the base, at what KL and cost. HTML."""
    name = table.decisive
    if name is None or not table.series:
        return ""
    best = max((s for s in table.series), key=lambda s: table.rows[s.best].numbers.get(name, float("-inf")))
    row = table.rows[best.best]
    values = row.numbers
    at = f" at {row.setting}" if row.setting else ""
    text = f"<strong>{html.escape(best.name)}</strong>{html.escape(at)} has the highest {MEASURES[name]}: "
    text += f"<strong>{plus_minus(values, name)}</strong>"
    base = next((table.rows[s.best].numbers for s in table.series if s.base and s.run == best.run), None)
    if base is not None and not best.base:
        text += f", where the base has {plus_minus(base, name)}"
    text += f", for {number(values['kl'], 1)} nats of KL"
    if values.get("forwards") is not None:
        text += f" and {number(values['forwards'], 1)} passes through models for each token"
    text += "."
    if len(table.rows) > 2:
        # A maximum over settings is measured on the prompts that chose it.
        text += f" It is the best of {len(table.rows)} settings on these same prompts, so expect less of it on others."
    return f'<p class="lead">{text}</p>'


def counts(runs: Sequence[Run], table: Table) -> str:
    """How much the page is about: methods, settings, prompts, responses."""
    prompts = {prompt for row in table.rows for prompt in row.records}
    found = [
        (len(runs), "run", len(runs) > 1),
        (len(table.series), "method", bool(table.series)),
        (len(table.rows), "setting", bool(table.rows)),
        (len(prompts), "prompt", bool(prompts)),
        (sum(len(row.records) for row in table.rows), "response", bool(table.rows)),
        (sum(len(run.trained) for run in runs), "training run", any(run.trained for run in runs)),
    ]
    return " · ".join(f"{n:,} {word}{'s' * (n != 1)}" for n, word, shown in found if shown)


def _details(summary: str, body: str) -> str:
    return f'<details><summary>{html.escape(summary)}</summary><div class="scroll" tabindex="0">{body}</div></details>'


def _frontier(table: Table) -> str:
    if not table.measures:
        return ""
    panels = "".join(f'<figure class="plot" data-measure="{name}"></figure>' for name in table.measures)
    return (
        '<p class="hint">Means over prompts with 95 % intervals, a mark per setting. KL is to the base, on a '
        "logarithmic scale from 1 nat on; bounds and estimates of it are named in the table. Choose a method to hide "
        "it.</p>"
        '<div id="legend" class="legend" role="group" aria-label="Methods shown"></div>'
        f'<div class="panels two">{panels}</div>' + _details("The numbers as a table", tables.frontier(table))
    )


def _methods(table: Table) -> str:
    if not table.rows:
        return ""
    return (
        '<p class="hint">Each method at its best setting. Passes: tokens that go through models for each token of a '
        "response.</p>"
        '<div class="tools"><label><input type="checkbox" id="all-settings"> All settings</label></div>'
        f'<div class="scroll" tabindex="0">{tables.methods(table)}</div>'
    )


def _wins(table: Table) -> str:
    body = tables.wins(table) if table.measures else ""
    if not body:
        return ""
    return (
        f'<p class="hint">How often the row\'s response has the higher {MEASURES[table.measures[0]]} on the same '
        "prompt [%], ties half; each method at its best setting, the strongest first.</p>"
        f'<div class="scroll" tabindex="0">{body}</div>'
    )


def _over(table: Table, data: dict[str, Any]) -> str:
    body = tables.overshoot(table)
    if not body:
        return ""
    figure = ""
    if len(table.measures) == 2 and any(data["bases"]):
        figure = (
            '<p class="hint">The gain over the base in standard deviations of the base\'s responses: '
            '<span class="key solid"></span> gold, <span class="key dashed"></span> proxy. Where the lines part, the '
            "method exploits the learned reward.</p>"
            '<div class="grid" id="over"></div>'
        )
    return figure + _details("Best against strongest setting as a table", body)


def _responses(table: Table, data: dict[str, Any]) -> str:
    if not data["prompts"]:
        return ""
    options = [("", "All prompts")]
    if table.measures and any(series.base for series in table.series):
        word = MEASURES[table.measures[0]]
        options += [("worse", f"A response with less {word} than the base's")]
    if len(table.measures) == 2:
        options += [("hacked", "Proxy above, gold below the base's")]
    options += [("cut", "A response cut by the limit")]
    choices = "".join(f'<option value="{value}">{html.escape(words)}</option>' for value, words in options)
    return (
        '<div class="tools" role="search">'
        '<label class="grow">Search <input type="search" id="search" placeholder="in prompts and responses"></label>'
        f'<label>Show <select id="filter">{choices}</select></label></div>'
        '<div class="tools" id="columns" role="group" aria-label="Methods beside each other"></div>'
        '<p id="found" class="hint" role="status" aria-live="polite"></p>'
        '<div id="sheet"></div><p><button type="button" id="more">Show more</button></p>'
    )


def _tokens(table: Table, data: dict[str, Any]) -> str:
    if not data["tokens"]:
        return ""
    return (
        '<div class="tools"><label>Response <select id="token-response"></select></label>'
        '<label>Prompt <select id="token-prompt"></select></label>'
        '<label>Colour <select id="token-colour"></select></label></div>'
        '<p class="hint" id="token-hint"></p><div id="token-text" class="tokens"></div>'
        '<div id="token-scale"></div>'
        "<details><summary>The tokens as a table</summary>"
        '<div class="scroll" tabindex="0" id="token-table"></div></details>'
    )


def _training(runs: Sequence[Run], data: dict[str, Any]) -> str:
    if not data["training"]:
        return ""
    return (
        '<div class="tools"><label>Metric <select id="metric"></select></label></div>'
        '<div class="grid" id="curves"></div>' + _details("The runs as a table", tables.training(runs))
    )


def _provenance(runs: Sequence[Run], notes: Sequence[str], command: _Command | None) -> str:
    body = ""
    if notes:
        body += '<ul class="notes">' + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>"
    return body + tables.provenance(runs, command)

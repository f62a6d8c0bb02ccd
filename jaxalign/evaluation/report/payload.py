"""What the page's scripts read: numbers, curves, responses and tokens as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxalign.evaluation.report.folders import Run
from jaxalign.evaluation.report.numbers import Prompt, Row, Table, spread_of_base

FIELDS = ("gold", "gold_95", "reward", "reward_95", "kl", "kl_95", "kl_kind")
"""Of a row of results that figures show."""


def payload(runs: Sequence[Run], table: Table, prompts: int) -> tuple[dict[str, Any], list[str]]:
    """Collects what the scripts read.

    Args:
      runs, table: what the page is about.
      prompts: how many prompts' responses are kept, spread evenly.

    Returns:
      (the data, a sentence where responses are left out).
    """
    every: dict[Prompt, int] = {}
    for row in table.rows:
        for prompt in row.records:
            every.setdefault(prompt, len(every))
    kept = _spread(list(every), prompts)
    inspected = {p for row in table.rows for p in row.records if _line_of(row, p) is not None}
    kept += [prompt for prompt in every if prompt in inspected and prompt not in set(kept)]
    number = {prompt: i for i, prompt in enumerate(kept)}
    left_out = []
    if len(kept) < len(every):
        left_out = [f"Responses to {len(kept)} of {len(every)} prompts are on this page; the numbers are of all."]
    return {
        "measures": list(table.measures),
        "series": [
            {
                "name": s.name,
                "run": s.run,
                "base": s.base,
                "rows": list(s.rows),
                "best": s.best,
                "style": _style(table, j),
            }
            for j, s in enumerate(table.series)
        ],
        "rows": [_row(row) for row in table.rows],
        "bases": [{m: list(v) for m, v in spread_of_base(table, i).items()} for i in range(len(runs))],
        "training": [_curves(run.name if len(runs) > 1 else "", part) for run in runs for part in run.trained],
        "prompts": [prompt[0] for prompt in kept],
        "responses": [
            [_response(number[prompt], record) for prompt, record in row.records.items() if prompt in number]
            for row in table.rows
        ],
        "tokens": [
            _tokens(i, number[prompt], line) for i, row in enumerate(table.rows) for prompt, line in _lines(row)
        ],
    }, left_out


def _style(table: Table, series: int) -> int:
    """The number of a series' colour and mark; the bases have those of text."""
    return -1 if table.series[series].base else sum(not s.base for s in table.series[:series])


def _row(row: Row) -> dict[str, Any]:
    return {"series": row.series, "setting": row.setting} | {k: row.numbers[k] for k in FIELDS if k in row.numbers}


def _response(number: int, record: dict[str, Any]) -> list[Any]:
    """[prompt, text, gold, proxy, KL, tokens, whether it was cut by the limit]."""
    text = str(record["response"])
    return [
        number,
        text,
        record.get("gold"),
        record.get("reward"),
        record["kl"],
        len(record["tokens"]),
        int(record["truncated"]),
    ]


def _curves(run: str, part: Any) -> dict[str, Any]:
    """A training run's metrics by name: [steps, values]; lines without a finite value are left out."""
    names = sorted({name for line in part.lines for name in line} - {"step"})
    found = {}
    for name in names:
        points = [(line["step"], line[name]) for line in part.lines if _finite(line.get(name))]
        if points:
            found[name] = [[step for step, _ in points], [value for _, value in points]]
    return {"name": f"{run}/{part.name}" if run else part.name, "metrics": found}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _line_of(row: Row, prompt: Prompt) -> dict[str, Any] | None:
    index = row.records[prompt]["index"]
    return next((line for line in row.tokens if line["index"] == index), None)


def _lines(row: Row) -> list[tuple[Prompt, dict[str, Any]]]:
    return [(prompt, line) for prompt in row.records if (line := _line_of(row, prompt)) is not None]


def _tokens(row: int, prompt: int, line: dict[str, Any]) -> dict[str, Any]:
    return {"row": row, "prompt": prompt, "before": line.get("reward_before"), "tokens": line["pieces"]}


def _spread(items: list[Prompt], count: int) -> list[Prompt]:
    """`count` of the items, evenly spread, in their order."""
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]

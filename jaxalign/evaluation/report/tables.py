"""The tables of the page, as HTML that needs no script."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxalign._files import is_number
from jaxalign.evaluation.report.folders import Run
from jaxalign.evaluation.report.numbers import Table, overshoots, win_rate
from jaxalign.evaluation.results import Record

Cell = tuple[str, float | None]
"""HTML of a cell and the number that it is sorted by; None for text."""


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits behind the point, "–" for None."""
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "\u2212")


def plus_minus(row: Record, name: str, *, scale: float = 1.0, digits: int = 2) -> str:
    """A mean and its 95 % half-width; HTML."""
    if name not in row:
        return "–"
    half = row.get(f"{name}_95")
    interval = "" if half is None else f' <span class="pm">± {number(half * scale, digits)}</span>'
    return f'<span class="one">{number(row[name] * scale, digits)}{interval}</span>'


def mark(series: int, name: str) -> str:
    """A method's name with a place for its mark, which the scripts draw."""
    return f'<span class="mark" data-mark="{series}" aria-hidden="true"></span>{html.escape(name)}'


def _table(head: Sequence[str], rows: Iterable[str], *, caption: str, kind: str = "") -> str:
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<table class="{kind}"><caption class="sr">{html.escape(caption)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _row(head: str, cells: Sequence[str], attributes: str = "") -> str:
    return f'<tr{attributes}><th scope="row">{head}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def frontier(table: Table) -> str:
    """Every setting: KL and its kind, gold and proxy."""
    head = ["method", "setting", "KL [nats]", "kind of KL", *(_measure(name) for name in table.measures)]
    rows = []
    for row in table.rows:
        values = row.numbers
        cells = [html.escape(row.setting) or "–", plus_minus(values, "kl"), html.escape(str(values["kl_kind"]))]
        cells += [plus_minus(values, name) for name in table.measures]
        rows.append(_row(mark(row.series, table.series[row.series].name), cells, f' data-series="{row.series}"'))
    return _table(head, rows, caption="Reward against KL: every setting", kind="numbers text-2 text-4")


def methods(table: Table) -> str:
    """Every setting with its cost; those that are not the best of their method are hidden at first."""
    columns: list[tuple[str, Callable[[Record], Cell]]] = [
        (_measure(name), functools.partial(_measured, name)) for name in table.measures
    ]
    columns += [
        ("second gold", functools.partial(_measured, "second_gold")),
        ("KL [nats]", lambda r: (plus_minus(r, "kl"), r["kl"])),
        ("wins over base [%]", lambda r: (plus_minus(r, "win_rate", scale=100, digits=0), r.get("win_rate"))),
        ("diversity", lambda r: (number(r["diversity"]), r["diversity"])),
        ("coherence", lambda r: (number(r.get("coherence")), r.get("coherence"))),
        ("perplexity under the base", lambda r: (plus_minus(r, "perplexity", digits=0), r.get("perplexity"))),
        ("tokens", lambda r: (number(r["tokens"], 1), r["tokens"])),
        ("cut [%]", lambda r: (number(100 * r["truncated"], 0), r["truncated"])),
        ("passes per token", lambda r: (number(r.get("forwards"), 1), r.get("forwards"))),
        ("tokens/s", lambda r: (number(r.get("tokens_per_second"), 0), r.get("tokens_per_second"))),
    ]
    columns = [(name, of) for name, of in columns if any(of(row.numbers)[1] is not None for row in table.rows)]
    rows = []
    for i, row in enumerate(table.rows):
        cells = [f"<td>{html.escape(row.setting) or '–'}</td>"]
        for _, of in columns:
            text, value = of(row.numbers)
            sort = "" if value is None else f' data-value="{value!r}"'
            cells.append(f"<td{sort}>{text}</td>")
        series = table.series[row.series]
        best = " data-best" if i == series.best else ""
        name = f'<th scope="row">{mark(row.series, series.name)}</th>'
        rows.append(f'<tr data-series="{row.series}"{best}>{name}{"".join(cells)}</tr>')
    head = ["method", "setting", *(name for name, _ in columns)]
    return _table(head, rows, caption="Methods and what they cost", kind="numbers text-2 sortable")


def _measured(name: str, row: Record) -> Cell:
    return plus_minus(row, name), row.get(name)


def wins(table: Table) -> str:
    """Win rates of each method's best setting against each other's; "" where no two answer the same prompts."""
    best = [series.best for series in table.series]
    found = {(i, j): win_rate(table, best[i], best[j]) for i in range(len(best)) for j in range(len(best)) if i != j}

    def strength(i: int) -> float:
        rates = [rate.mean for (a, _), rate in found.items() if a == i and rate is not None]
        return sum(rates) / len(rates) if rates else -1.0

    compared = [i for i in range(len(best)) if strength(i) >= 0]
    order = sorted(compared, key=strength, reverse=True)
    if not order:
        return ""
    names = [series.name for series in table.series]
    head = ['<span class="sr">method</span>']
    head += [f'{k}<span class="sr"> {html.escape(names[j])}</span>' for k, j in enumerate(order, start=1)]
    rows = []
    for k, i in enumerate(order, start=1):
        cells = []
        for j in order:
            rate = found.get((i, j))
            if rate is None:
                cells.append('<td class="none">·</td>')
                continue
            percent, side = 100 * rate.mean, "up" if rate.mean >= 0.5 else "down"
            words = f"{names[i]} against {names[j]}: {percent:.0f} ± {100 * rate.half_width:.0f} %"
            tint = round(abs(percent - 50) * 1.3)
            cells.append(
                f'<td class="{side}" style="--w:{tint}%" title="{html.escape(words, quote=True)}">{percent:.0f}</td>'
            )
        label = f'<span class="rank">{k}</span>{mark(i, names[i])}'
        rows.append(f'<tr data-series="{i}"><th scope="row">{label}</th>{"".join(cells)}</tr>')
    return _table(head, rows, caption="Win rates of the row against the column [%]", kind="wins")


def overshoot(table: Table) -> str:
    """Best against strongest setting of each method; "" where no method has several, or gold or proxy is missing."""
    head = ["method", "best setting", "gold there", "proxy there", "strongest", "gold there", "proxy there"]
    head += ["gold lost", "what the intervals say"]
    rows = []
    for found in overshoots(table):
        cells = []
        for k in (found.best, found.strongest):
            row = table.rows[k]
            cells += [html.escape(row.setting), plus_minus(row.numbers, "gold"), plus_minus(row.numbers, "reward")]
        loss = {"loss": -found.gold.mean, "loss_95": found.gold.half_width}
        cells += [plus_minus(loss, "loss"), found.verdict]
        rows.append(_row(mark(found.series, table.series[found.series].name), cells, f' data-series="{found.series}"'))
    kind = "numbers text-2 text-5 text-9"
    return _table(head, rows, caption="Best against strongest setting of each method", kind=kind) if rows else ""


def training(runs: Sequence[Run]) -> str:
    """Training runs: steps, first and last loss, and what summary.json says."""
    rows = []
    for run in runs:
        for part in run.trained:
            losses = [line["loss"] for line in part.lines if line.get("loss") is not None]
            speeds = sorted(line["tokens_per_second"] for line in part.lines if line.get("tokens_per_second"))
            kept = {k: v for k, v in part.summary.items() if is_number(v) and not k.endswith("rows")}
            cells = [
                number(part.lines[-1]["step"] if part.lines else None, 0),
                number(losses[0] if losses else None, 3),
                number(losses[-1] if losses else None, 3),
                number(speeds[len(speeds) // 2] if speeds else None, 0),
                html.escape(", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in kept.items())) or "–",
            ]
            rows.append(_row(html.escape(f"{run.name}/{part.name}" if len(runs) > 1 else part.name), cells))
    head = ["run", "steps", "first loss", "last loss", "tokens/s", "summary"]
    return _table(head, rows, caption="Training runs", kind="numbers text-6")


def provenance(runs: Sequence[Run], command: Callable[[dict[str, Any]], str | None] | None) -> str:
    """Commands, versions and seconds of each run."""
    out = []
    for run in runs:
        body = "".join(f"<pre>{html.escape(text)}</pre>" for text in _commands(run, command))
        versions = dict[str, str]()
        for found in [part.versions for part in run.decoded] + [part.versions for part in run.trained]:
            versions |= found or {}
        pairs = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in versions.items())
        body += f'<dl class="versions">{pairs}</dl>' if pairs else ""
        if run.seconds:
            total = sum(run.seconds.values())
            rows = [_row(html.escape(name), [number(s, 1)]) for name, s in run.seconds.items()]
            stages = _table(["stage", "seconds"], rows, caption="Seconds per stage", kind="numbers")
            body += f"<details><summary>{number(total, 0)} seconds in all, by stage</summary>{stages}</details>"
        out.append(f"<h3>{html.escape(run.name)}</h3>{body}")
    return "".join(out)


def _commands(run: Run, command: Callable[[dict[str, Any]], str | None] | None) -> list[str]:
    """The command of the run where it has options of its own, else one per folder; methods of one run together."""
    if run.options is not None:
        return [_spoken(run.options, command)]
    merged: dict[str, dict[str, Any]] = {}  # the options besides the method -> the options
    for part in run.decoded:
        if part.options is None:
            continue
        shared = {name: value for name, value in part.options.items() if name != "method"}
        shared["out"] = str(part.path.parent)
        options = merged.setdefault(json.dumps(shared, sort_keys=True), shared | {"method": []})
        options["method"].append(part.options.get("method", ""))
    found = [part.options for part in run.trained if part.options is not None] + list(merged.values())
    return [_spoken(options, command) for options in found]


def _spoken(options: dict[str, Any], command: Callable[[dict[str, Any]], str | None] | None) -> str:
    return (command(options) if command else None) or json.dumps(options, indent=1, ensure_ascii=False)


def _measure(name: str) -> str:
    return {"gold": "gold", "reward": "proxy"}[name]

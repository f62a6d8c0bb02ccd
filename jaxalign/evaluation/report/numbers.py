"""The numbers of the report: methods as series of settings, win rates, and what a learned reward hides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxalign import metrics
from jaxalign._arrays import is_flat_on_host
from jaxalign.evaluation import results
from jaxalign.evaluation.plots import STYLES, family, label
from jaxalign.evaluation.report.folders import Run
from jaxalign.evaluation.results import Record
from jaxalign.metrics import Estimate

Prompt = tuple[str, int]
"""A prompt, and how often its text stood before it among the prompts of its run."""


class Row(NamedTuple):
    """A method at one setting."""

    series: int
    """Its series."""
    setting: str
    """What tells it from the others of its series: "beta 0.5", "n 4"; "" for a method with one setting."""
    numbers: Record
    """A row of `results.summarise`, with tokens_per_second."""
    records: dict[Prompt, Record]
    """Its responses."""
    tokens: list[Record]
    """Its lines of tokens.jsonl."""


class Series(NamedTuple):
    """A method: a line of the figures."""

    name: str
    """The paper's name, and what tells it from another series of that name."""
    run: int
    """Its run."""
    base: bool
    """Whether it is the base, which has the colour of text."""
    rows: tuple[int, ...]
    """Its settings by growing KL, as indices of rows."""
    best: int
    """The row of highest gold (or proxy, without gold)."""


class Table(NamedTuple):
    """All methods of a report."""

    rows: list[Row]
    """A row per run, method and setting."""
    series: list[Series]
    """A series per run and method."""
    measures: tuple[str, ...]
    """"gold" and "reward", those that the responses have."""

    @property
    def decisive(self) -> str | None:
        """The measure that methods are judged by: gold, else the proxy; None without a reward."""
        return self.measures[0] if self.measures else None


class Overshoot(NamedTuple):
    """A method at its best setting and at its strongest."""

    series: int
    """The series."""
    best: int
    """The row of highest gold."""
    strongest: int
    """The row of largest KL."""
    gold: Estimate
    """Gold at the strongest less gold at the best, on the same prompts."""
    proxy: Estimate
    """The same difference of the proxy."""

    @property
    def verdict(self) -> str:
        """What the intervals say."""
        if self.best == self.strongest:
            return "not seen: the strongest setting is the best"
        if self.gold.mean + self.gold.half_width < 0 and self.proxy.mean > 0:
            return "proxy up, gold down"
        return "gold down" if self.gold.mean + self.gold.half_width < 0 else "within the interval"


def gather(runs: Sequence[Run]) -> Table:
    """Puts the responses of all runs into one table.

    Args:
      runs: as `folders.read_runs` gives them.

    Returns:
      The table; its rows are in the order of series, and within one by growing KL.
    """
    found: dict[tuple[int, str, str], list[Row]] = {}  # run, family, source -> rows
    for i, run in enumerate(runs):
        decoded = [part for part in run.decoded if part.records]
        speeds = {key: speed for part in decoded for key, speed in part.speeds.items()}
        # Folders inside a run may answer other prompts: an index is of one folder, and a prompt of the run.
        numbered: dict[Prompt, int] = {}
        records, inspected = list[Record](), list[Record]()
        for part in decoded:
            own = {index: numbered.setdefault(p, len(numbered)) for index, p in _prompts(part.records).items()}
            records += [record | {"index": own[record["index"]]} for record in part.records]
            inspected += [line | {"index": own[line["index"]]} for line in part.tokens if line["index"] in own]
        names = {index: prompt for prompt, index in numbered.items()}
        for row in results.summarise(records):
            key = row["method"], row["beta"]
            row["tokens_per_second"] = speeds.get(key)
            answers = {names[r["index"]]: r for r in records if (r["method"], r["beta"]) == key}
            tokens = [line for line in inspected if (line["method"], line["beta"]) == key]
            place = i, family(row["method"]), _source(row["method"])
            found.setdefault(place, []).append(Row(0, _setting(row), row, answers, tokens))
    order = {name: i for i, name in enumerate(STYLES)}
    places = sorted(found, key=lambda place: (order.get(place[1], len(order)), place[1], place[0]))
    named = [_name(place, places, runs) for place in places]
    everything = [row.numbers for rows in found.values() for row in rows]
    measures = tuple(name for name in ("gold", "reward") if any(name in row for row in everything))
    rows: list[Row] = []
    series = []
    for j, place in enumerate(places):
        own_rows = sorted(found[place], key=lambda row: row.numbers["kl"])
        indices = tuple(range(len(rows), len(rows) + len(own_rows)))
        rows += [row._replace(series=j) for row in own_rows]
        best = indices[0]
        if measures:
            # A run without gold is judged by the proxy.
            judge = next(name for name in measures if name in own_rows[0].numbers or name == measures[-1])
            best = max(indices, key=lambda k: rows[k].numbers.get(judge, -np.inf))
        series.append(Series(named[j], place[0], place[1] == "base", indices, best))
    return Table(rows, series, measures)


def win_rate(table: Table, a: int, b: int) -> Estimate | None:
    """The share of shared prompts on which row `a` has the higher gold (or proxy), ties half; None without such."""
    name = table.decisive
    if name is None:
        return None
    first, second = table.rows[a].records, table.rows[b].records
    shared = [p for p in first if p in second and name in first[p] and name in second[p]]
    if not shared:
        return None
    margin = [first[p][name] - second[p][name] for p in shared]
    return metrics.mean_interval([(m > 0) + 0.5 * (m == 0) for m in margin])


def overshoots(table: Table) -> list[Overshoot]:
    """Compares the best with the strongest setting of each method that has several, where there are gold and proxy."""
    if len(table.measures) < 2:
        return []
    out = []
    for j, series in enumerate(table.series):
        strongest = series.rows[-1]
        best, last = table.rows[series.best].records, table.rows[strongest].records
        both = [p for p in best if p in last]
        shared = [p for p in both if all(m in r[p] for m in table.measures for r in (best, last))]
        if len(series.rows) < 2 or not shared:
            continue
        gold, proxy = (
            metrics.mean_interval([last[prompt][name] - best[prompt][name] for prompt in shared])
            for name in ("gold", "reward")
        )
        out.append(Overshoot(j, series.best, strongest, gold, proxy))
    return out


def spread_of_base(table: Table, run: int) -> dict[str, tuple[float, float]]:
    """Measure -> (mean, standard deviation) of the responses of a run's base; {} without a base or without a spread."""
    base = next((table.rows[series.best] for series in table.series if series.base and series.run == run), None)
    if base is None:
        return {}
    values = {m: np.asarray([r[m] for r in base.records.values() if m in r]) for m in table.measures}
    found = {m: (float(v.mean()), float(v.std())) for m, v in values.items() if v.size and not is_flat_on_host(v)}
    return found if len(found) == len(table.measures) else {}


def _prompts(records: Sequence[Record]) -> dict[int, Prompt]:
    """Index -> prompt, of one folder."""
    texts = {record["index"]: record["prompt"] for record in records}
    seen: dict[str, int] = {}
    out = {}
    for index in sorted(texts):
        text = texts[index] if isinstance(texts[index], str) else str(texts[index])
        out[index] = text, seen.get(text, 0)
        seen[text] = seen.get(text, 0) + 1
    return out


def _source(method: str) -> str:
    """A method's name without its number of samples, so that best_of_2 and best_of_4 are one series."""
    return re.sub(r"^(best_of|blockwise|ggro|quest)_\d+(x\d+)?", r"\1", method)


def _name(place: tuple[int, str, str], places: Sequence[tuple[int, str, str]], runs: Sequence[Run]) -> str:
    """The family, with its source and its run where other series have that name."""
    i, kind, source = place
    name = kind
    if len({other[2] for other in places if other[:2] == (i, kind)}) > 1:
        name += f" ({_short(source)})"
    return name if len({other[0] for other in places}) == 1 else f"{name} · {runs[i].name}"


def _short(source: str) -> str:
    """A method's name with folders by their last part that is not "model"."""
    return re.sub(r"[^\s:]*/", "", re.sub(r"/model(?=$|[\s/@])", "", source))


def _setting(row: Record) -> str:
    method = row["method"]
    parts = [label(method).partition(", ")[2]]
    if family(method) == "best-of-n":
        parts = [f"n {method.rpartition('_')[2]}"]
    if row["beta"] is not None:
        own = "step" if family(method) == "RE-Control" else "strength" if _is_function(method) else "beta"
        parts.append(f"{own} {row['beta']:g}")
    return ", ".join(part for part in parts if part)


def _is_function(method: str) -> bool:
    """Whether a method is a user's own, which stands in tables under its own name."""
    return family(method) == method

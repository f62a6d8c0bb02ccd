"""What quickstart shows: rows of results, the picture of utility against KL, responses side by side."""

from __future__ import annotations

import html
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from eval import results

LABELS = {
    "base": "base",
    "best_of": "best-of-n",
    "args": "ARGS",
    "value": "CD-FUDGE",
    "autoregressive": "GenARM",
    "follower": "Stackelberg",
}
# Okabe and Ito's colours, and a marker each: told apart without colour, too.
STYLES = {
    "base": ("black", "s"),
    "best-of-n": ("#CC79A7", "D"),
    "ARGS": ("#D55E00", "v"),
    "CD-FUDGE": ("#E69F00", "o"),
    "GenARM": ("#009E73", "^"),
    "Stackelberg": ("#0072B2", "P"),
}


def family(method: str) -> str:
    """The method of a row, whatever its folder or n."""
    return next(label for prefix, label in LABELS.items() if method.startswith(prefix))


def rows(records: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and beta over the records of several runs, with the speeds of their summaries."""
    found = results.summarise(records)
    known = {(row["method"], row["beta"]): row["tokens_per_second"] for row in speeds}
    for row in found:
        row["tokens_per_second"] = known.get((row["method"], row["beta"]))
        label = family(row["method"])
        row["method"] = row["method"].replace("_", "-") if label in ("base", "best-of-n") else _name(row["method"])
    return found


def _name(method: str) -> str:
    """The label; with the bound of a shaped reward, by which the folder of its head is named."""
    bound = re.search(r"exceedance_([\d.]+)", method)
    return f"{family(method)}, B {bound.group(1)}" if bound else family(method)


def frontier(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Two panels over one KL axis: true utility (gold), and what the methods maximise (the reward model)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained", sharex=True)
    titles = {"gold": "true utility (gold)", "reward": "learned reward (proxy)"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for label, (colour, marker) in STYLES.items():
            mine = [row for row in rows if _label(row) == label]
            mine.sort(key=lambda row: row["kl"])
            axes.errorbar(
                [row["kl"] for row in mine],
                [row[name] for row in mine],
                [row[f"{name}_95"] or 0 for row in mine],
                marker=marker,
                ms=5,
                lw=1.4,
                capsize=2,
                color=colour,
                label=label,
                zorder=3 if label == "base" else 2,
            )
        base = next(row for row in rows if row["method"] == "base")
        axes.axhline(base[name], color="0.8", lw=1, zorder=0)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlim(-0.1, 1.4 * max(row["kl"] for row in rows))
        ticks = [t for t in (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if t <= 1.3 * max(row["kl"] for row in rows)]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("KL to the base [nats]")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("mean per response, 95 % interval")
    panels[0].legend(frameon=False, fontsize=8)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
    pyplot.close(figure)


def _label(row: dict[str, Any]) -> str:
    return "best-of-n" if row["method"].startswith("best-of") else row["method"].partition(",")[0]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Responses side by side</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed; }}
th, td {{ text-align: left; vertical-align: top; padding: .5rem .6rem; border-bottom: 1px solid #ddd; }}
thead th {{ background: #f6f6f6; position: sticky; top: 0; }}
td:first-child {{ font-weight: 600; }}
small {{ color: #777; display: block; margin-top: .3rem; }}
.good {{ color: #11734b; }} .bad {{ color: #a02c2c; }}
</style></head><body>
<h1>Responses side by side</h1>
<p>One setting per method: the one of highest mean gold reward. Under each response its gold reward (what the world's
program pays) and its proxy reward (what the reward model says).</p>
<table><thead><tr><th>prompt</th>{head}</tr></thead><tbody>
{body}
</tbody></table></body></html>
"""


def side_by_side(
    records: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: pathlib.Path, *, prompts: int = 24
) -> None:
    """An HTML table: prompts down, methods across, each at its setting of highest gold reward."""
    summary = results.summarise(records)
    best: dict[str, dict[str, Any]] = {}  # label -> the row of its setting
    for row in summary:
        label = family(row["method"])
        if label not in best or row["gold"] > best[label]["gold"]:
            best[label] = row
    chosen = {(row["method"], row["beta"]): label for label, row in best.items()}
    table: dict[int, dict[str, dict[str, Any]]] = {}
    for record in records:
        key = (record["method"], record["beta"])
        if key in chosen:
            table.setdefault(record["index"], {})[chosen[key]] = record
    head = "".join(
        f"<th>{label}<small>{_setting(row)} KL {row['kl']:.1f}, gold {row['gold']:.2f}</small></th>"
        for label, row in best.items()
    )
    step = max(len(table) // prompts, 1)
    body = []
    for index in sorted(table)[::step][:prompts]:
        cells = "".join(_cell(table[index][label]) for label in best)
        prompt = next(iter(table[index].values()))["prompt"]
        body.append(f"<tr><td>{html.escape(prompt)}</td>{cells}</tr>")
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(PAGE.format(head=head, body="\n".join(body)), encoding="utf-8")
    temporary.replace(path)


def _setting(row: dict[str, Any]) -> str:
    if row["beta"] is not None:
        bound = _name(row["method"]).partition(", ")[2]
        return f"{bound}, beta {row['beta']:g}," if bound else f"beta {row['beta']:g},"
    return f"n = {row['method'].rpartition('_')[2]}," if row["method"].startswith("best") else ""


def _cell(record: dict[str, Any]) -> str:
    kind = "good" if record["gold"] > 0 else "bad"
    scores = f'gold <span class="{kind}">{record["gold"]:.1f}</span>, proxy {record["reward"]:.1f}'
    return f"<td>{html.escape(record['response'])}<small>{scores}</small></td>"

"""What quickstart shows besides the picture: responses side by side, with rewards and KL."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxalign.evaluation import results
from jaxalign.evaluation.plots import family, label

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Responses side by side</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; }}
table {{ border-collapse: collapse; table-layout: fixed; }}
th, td {{ width: 15rem; text-align: left; vertical-align: top; padding: .5rem .6rem; border-bottom: 1px solid #ddd; }}
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


def side_by_side(records: Sequence[dict[str, Any]], path: pathlib.Path, *, prompts: int = 24) -> None:
    """An HTML table: prompts down, methods across, each at its setting of highest gold reward."""
    summary = results.summarise(records)
    best: dict[str, dict[str, Any]] = {}  # family -> the row of its setting
    for row in summary:
        kind = family(row["method"])
        if kind not in best or row["gold"] > best[kind]["gold"]:
            best[kind] = row
    chosen = {(row["method"], row["beta"]): kind for kind, row in best.items()}
    table: dict[int, dict[str, dict[str, Any]]] = {}
    for record in records:
        key = (record["method"], record["beta"])
        if key in chosen:
            table.setdefault(record["index"], {})[chosen[key]] = record
    head = "".join(
        f"<th>{kind}<small>{_setting(row)} KL {row['kl']:.1f}, gold {row['gold']:.2f}</small></th>"
        for kind, row in best.items()
    )
    step = max(len(table) // prompts, 1)
    body = []
    for index in sorted(table)[::step][:prompts]:
        cells = "".join(_cell(table[index][kind]) for kind in best)
        prompt = next(iter(table[index].values()))["prompt"]
        body.append(f"<tr><td>{html.escape(prompt)}</td>{cells}</tr>")
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(PAGE.format(head=head, body="\n".join(body)), encoding="utf-8")
    temporary.replace(path)


def _setting(row: dict[str, Any]) -> str:
    parts = [label(row["method"]).partition(", ")[2]]
    if row["method"].startswith("best"):
        parts = [f"n = {row['method'].rpartition('_')[2]}"]
    if row["beta"] is not None:
        parts.append(f"{'step' if row['method'].startswith('re_control') else 'beta'} {row['beta']:g}")
    return "".join(f"{part}, " for part in parts if part).rstrip()


def _cell(record: dict[str, Any]) -> str:
    kind = "good" if record["gold"] > 0 else "bad"
    scores = f'gold <span class="{kind}">{record["gold"]:.1f}</span>, proxy {record["reward"]:.1f}'
    return f"<td>{html.escape(record['response'])}<small>{scores}</small></td>"

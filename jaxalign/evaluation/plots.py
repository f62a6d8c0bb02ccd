"""The picture of a comparison: true utility and learned reward against KL, a line per family of methods."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from jaxalign import _io

LABELS = {
    "base": "base",
    "best_of": "best-of-n",
    "args": "ARGS",
    "value": "CD-FUDGE",
    "genarm": "GenARM",
    "follower": "Stackelberg",
    "blockwise": "blockwise CD",
    "beam": "beam search",
    "transfer": "Transfer Q*",
    "policy": "policy",
    "re_control": "RE-Control",
    "ggro": "GGRO",
    "smc": "SMC",
    "quest": "QUEST",
    "cards": "CARDS",
    "distribution": "distributional CD",
}
READINGS = {
    "follower": "Stackelberg",
    "calibrated": "InfAlign's tilt",
    "mean": "distributional CD, mean",
    "best_of": "best-of-n by tokens",
}
"""Readings of a head of laws that are methods of their own, each with a line of its own."""
# Okabe and Ito's colours and a few more, and a marker each: told apart without colour, too.
STYLES = {
    "base": ("black", "s"),
    "best-of-n": ("#CC79A7", "D"),
    "ARGS": ("#D55E00", "v"),
    "CD-FUDGE": ("#E69F00", "o"),
    "CD-Q": ("#A6761D", "p"),
    "blockwise CD": ("#8C564B", "h"),
    "beam search": ("#332288", "H"),
    "Transfer Q*": ("#7570B3", "<"),
    "GenARM": ("#009E73", "^"),
    "Stackelberg": ("#0072B2", "P"),
    "DPO": ("#56B4E9", "*"),
    "RL": ("#E7298A", "s"),
    "RE-Control": ("#999999", "X"),
    "GGRO": ("#B2DF8A", ">"),
    "SMC": ("#444444", "d"),
    "QUEST": ("#F0E442", "8"),
    "CARDS": ("#F781BF", "H"),
    "distributional CD": ("#A65628", "o"),
    "distributional CD, mean": ("#E69F00", "o"),
    "best-of-n by tokens": ("#882255", "D"),
    "InfAlign's tilt": ("#4DAF4A", "p"),
}


READING = r"distribution:.*:(\w+)(?:\(([^()]*)\))?(?:@([^@/]*))?"
"""A method that reads a head of laws: its reading, the reading's numbers, and n or nats."""


def family(method: str) -> str:
    """The family of a method's name, whatever its folder, beta or n; the name itself for a method of the user's."""
    if re.search(r"\s[+-]\s|^\S+ \* ", method.removeprefix("smc:")):
        return "SMC" if method.startswith("smc:") else "sum of critics"
    if method.startswith("value:") and "cd_q" in method:
        return "CD-Q"
    if found := re.fullmatch(READING, method):
        return READINGS.get(found.group(1), LABELS["distribution"])
    if found := re.match(r"policy:(?:.*/)?(rl|dpo)(?:_[^/]*)?(?:/model)?/?$", method):
        return found.group(1).upper()
    return next((label for prefix, label in LABELS.items() if method.startswith(prefix)), method)


def label(method: str) -> str:
    """The family with what tells its rows apart besides beta: n, blocks, the bound of a shaped reward."""
    if found := re.match(r"best_of_(\d+)", method):
        return f"best-of-{found.group(1)}"
    if found := re.match(r"blockwise_(\d+)x(\d+)", method):
        return f"blockwise CD, {found.group(1)} of {found.group(2)} tokens"
    if found := re.match(r"beam_(\d+)x(\d+)x(\d+)", method):
        return f"beam search, {found.group(1)} of {found.group(2)} x {found.group(3)} tokens"
    if found := re.match(r"ggro_(\d+)", method):
        return f"GGRO, {found.group(1)} forms"
    if found := re.search(r"exceedance_([\d.]+)", method):
        return f"{family(method)}, B {found.group(1)}"
    if found := re.fullmatch(READING, method):
        name = [] if found.group(1) in ("soft", *READINGS) else [found.group(1)]
        parts = [*name, *(part.strip().replace("bound=", "B ") for part in found.groups()[1:] if part)]
        return ", ".join([family(method), *parts])
    return family(method)


def frontier(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """A panel per measure over one KL axis: true utility (gold) where there is one, and what the methods maximise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"gold": "true utility (gold)", "reward": "learned reward (proxy)"}
    titles = {name: title for name, title in titles.items() if name in rows[0]}
    figure, panels = pyplot.subplots(
        1, len(titles), figsize=(1.6 + 4.6 * len(titles), 4.6), layout="constrained", sharex=True, squeeze=False
    )
    widest = max(row["kl"] for row in rows)
    for axes, (name, title) in zip(panels[0], titles.items(), strict=True):
        for kind, (colour, marker) in STYLES.items():
            mine = sorted((row for row in rows if family(row["method"]) == kind), key=lambda row: row["kl"])
            if not mine:
                continue
            axes.errorbar(
                [row["kl"] for row in mine],
                [row[name] for row in mine],
                [row[f"{name}_95"] or 0 for row in mine],
                marker=marker,
                ms=5,
                lw=1.4,
                capsize=2,
                color=colour,
                label=kind,
                zorder=3 if kind in ("base", "SMC") else 2,
            )
        base = next((row for row in rows if row["method"] == "base"), None)
        if base is not None:
            axes.axhline(base[name], color="0.8", lw=1, zorder=0)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlim(-0.1, 1.4 * max(widest, 0.5))
        ticks = [t for t in (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if t <= 1.3 * widest]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("KL to the base [nats]")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel("mean per response, 95 % interval")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    with _io.whole_file(path) as sink:
        figure.savefig(sink, dpi=150, format="png")
    pyplot.close(figure)

"""The picture of a comparison: true utility and learned reward against KL, a line per family of methods and per method
of one's own."""

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
    "sum of critics": ("#6A3D9A", "X"),
}
OWN_COLOURS = ("#1F78B4", "#B15928", "#33A02C", "#E31A1C", "#6A3D9A", "#FF7F00", "#01665E")
OWN_MARKERS = ("o", "^", "s", "v", "D", "<", "p", ">", "h", "P", "*")
"""Of methods of one's own, in turn, with hollow markers. Their numbers have no common factor: all pairs come."""
LONGEST_NAME, MOST_IN_COLUMN = 40, 22
"""Letters of a name in the legend, and names below each other."""


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
    # "base", "value:DIR", "best_of_4", "beam_2x4x8 value:DIR", and not MODULE:FUNCTION of a module best_of_mine.
    return next((label for kind, label in LABELS.items() if re.match(rf"{kind}(?:$|[: ]|_\d)", method)), method)


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


def _styles(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Family -> how it is drawn, of the families of the rows: the library's first."""
    there = dict.fromkeys(family(row["method"]) for row in rows)
    found = {name: {"color": colour, "marker": marker} for name, (colour, marker) in STYLES.items() if name in there}
    for i, name in enumerate(name for name in there if name not in STYLES):
        colour, marker = OWN_COLOURS[i % len(OWN_COLOURS)], OWN_MARKERS[i % len(OWN_MARKERS)]
        found[name] = {"color": colour, "marker": marker, "mfc": "white"}
    return found


def _shown(name: str) -> str:
    """A name for the legend, which leaves out names that begin with "_"."""
    short = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
    return f" {short}" if short.startswith("_") else short


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
    widest, least = max(row["kl"] for row in rows), min(row["kl"] for row in rows)
    styles = _styles(rows)
    for axes, (name, title) in zip(panels[0], titles.items(), strict=True):
        for kind, style in styles.items():
            mine = sorted((row for row in rows if family(row["method"]) == kind), key=lambda row: row["kl"])
            axes.errorbar(
                [row["kl"] for row in mine],
                [row[name] for row in mine],
                [row[f"{name}_95"] or 0 for row in mine],
                ms=5,
                lw=1.4,
                capsize=2,
                label=_shown(kind),
                zorder=3 if kind in ("base", "SMC") else 2,
                **style,
            )
        base = next((row for row in rows if row["method"] == "base"), None)
        if base is not None:
            axes.axhline(base[name], color="0.8", lw=1, zorder=0)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlim(min(-0.1, 1.4 * least), 1.4 * max(widest, 0.5))  # a log-ratio may be below 0
        ticks = [t for t in (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if t <= 1.3 * widest]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("KL to the base [nats]")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel("mean per response, 95 % interval")
    handles = panels[0, 0].get_legend_handles_labels()
    columns = 1 + (len(styles) - 1) // MOST_IN_COLUMN
    figure.set_figwidth(figure.get_figwidth() + 1.6 * (columns - 1))
    figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8, ncols=columns)
    with _io.whole_file(path) as sink:
        figure.savefig(sink, dpi=150, format="png")
    pyplot.close(figure)

"""What the studies share: options, shapings by name, estimates, the table and the picture."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxalign import _io, infalign, metrics, shaping
from jaxalign.types import Array, ArrayLike

from ..bench.common import device


class Shape(Protocol):
    """A shaping: utility [...,n] and the utilities of base samples [...,K] -> reward [...,n]."""

    def __call__(self, utility: Any, reference: Any, /) -> Array: ...


STYLES: dict[str, tuple[str, str]] = {
    # Okabe and Ito's colours, and a marker each: told apart without colour, too.
    "base": ("black", "s"),
    "raw": ("#D55E00", "v"),
    "Minmax": ("#CC79A7", "D"),
    "Meanstd": ("#999999", "P"),
    "Cap": ("#8C564B", "X"),
    "mean sigmoid": ("#56B4E9", "<"),
    "log sigmoid": ("#F0E442", ">"),
    "PAR": ("#E69F00", "^"),
    "calibrated": ("#882255", "p"),
    "calibrated, exp:10": ("#332288", "*"),
    "calibrated, threshold": ("#88CCEE", "8"),
    "soft threshold": ("#009E73", "h"),
    "threshold": ("#0072B2", "o"),
}
"""Shaping -> (colour, marker)."""

CALIBRATED = ("calibrated", "calibrated, exp:10")
"""Rewards of InfAlign: quantiles among the base samples, and their exponential."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every study."""

    out: str = "docs/figures"
    """Folder for NAME.json and NAME.png."""
    seed: int = 0
    """Seed of all draws."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def check(options: Options) -> None:
    """Checks options: counts are positive, lists are not empty, numbers are positive and finite.

    Args:
      options: of the study.

    Raises:
      ValueError: one that is not; the option is named.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "seed" or isinstance(value, str | bool):
            continue
        values = value if isinstance(value, tuple) else (value,)
        default = field.default if isinstance(field.default, tuple) else ()
        if any(isinstance(v, str) for v in (*values, *default)):
            continue
        if not values or not all(0 < v < math.inf for v in values):
            raise ValueError(f"{field.name}: expected finite values > 0, found {value}")


def shapes(bound: float, beta: float, *, sharpness: float) -> dict[str, Shape]:
    """Gives every shaping at one bound and one KL weight of the follower, by name.

    Calibrated rewards (InfAlign) run from 0 to the bound; "calibrated, threshold" is the leader's answer when quantiles
    are its utility.

    Args:
      bound: the largest reward.
      beta: the follower's KL weight, in units of reward per nat.
      sharpness: of the sigmoid forms, in 1/units of utility.

    Returns:
      name -> Shape.
    """
    exponential = infalign.parse_transform("exp:10")

    def ranks(u: ArrayLike, reference: ArrayLike) -> Array:
        return infalign.calibrate(u, reference=reference)

    return {
        "raw": lambda u, reference: shaping.raw(u, reference=reference),
        "Minmax": lambda u, reference: shaping.minmax(u, reference=reference, bound=bound),
        "Meanstd": lambda u, reference: shaping.meanstd(u, reference=reference),
        "Cap": lambda u, reference: shaping.cap(u, reference=reference, bound=bound),
        "mean sigmoid": lambda u, ref: shaping.mean_sigmoid(u, reference=ref, bound=bound, sharpness=sharpness),
        "log sigmoid": lambda u, reference: shaping.log_sigmoid(u, reference=reference),
        "PAR": lambda u, reference: shaping.preference_as_reward(u, reference=reference),
        "calibrated": lambda u, reference: bound * ranks(u, reference),
        "calibrated, exp:10": lambda u, reference: bound * exponential(ranks(u, reference)),
        "calibrated, threshold": lambda u, reference: shaping.stackelberg(
            ranks(u, reference), reference=ranks(reference, reference), bound=bound, beta=beta
        ),
        "soft threshold": lambda u, ref: shaping.stackelberg(
            u, reference=ref, bound=bound, beta=beta, sharpness=sharpness
        ),
        "threshold": lambda u, reference: shaping.stackelberg(u, reference=reference, bound=bound, beta=beta),
    }


def estimate(name: str, values: Any) -> dict[str, float | None]:
    """Gives the mean of independent cases with its interval, as entries of a row.

    Args:
      name: of the column.
      values: one per case.

    Returns:
      {name: mean, name_95: half-width of its 95 % interval, None for a single case}.
    """
    found = metrics.mean_interval(np.asarray(values))
    return {name: found.mean, f"{name}_95": None if math.isnan(found.half_width) else found.half_width}


def report(name: str, options: Options, rows: Sequence[dict[str, Any]], *, digits: int = 3) -> pathlib.Path:
    """Prints the rows and writes them to a file.

    Args:
      name: of the study.
      options: its options, which the file holds too.
      rows: of the table.
      digits: decimals printed.

    Returns:
      The folder of NAME.json.
    """
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    given = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "config", "run")}
    about = {"device": device(), "jax": jax.__version__, "options": given}
    _io.write_json(out / f"{name}.json", about | {"rows": list(rows)})
    table(rows, digits=digits)
    return out


def table(rows: Sequence[dict[str, Any]], *, digits: int = 3) -> None:
    """Prints one line per row, a mean followed by its half-width; a heading wherever the columns change.

    Args:
      rows: of the table.
      digits: decimals printed.
    """
    last: list[str] | None = None
    for row in rows:
        names = [name for name in row if not name.endswith("_95")]
        if names != last:
            print(("\n" if last else "") + "  ".join(f"{name:>18}" for name in names))
            last = names
        print("  ".join(f"{_cell(row, name, digits):>18}" for name in names))


def _cell(row: dict[str, Any], name: str, digits: int) -> str:
    value = row[name]
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    half = row.get(f"{name}_95")
    return f"{value:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure under a temporary name, then renames it.

    Args:
      figure: of matplotlib.
      path: of the file.
    """
    with _io.whole_file(path) as sink:
        figure.savefig(sink, dpi=130, format="png")
    pyplot().close(figure)
    print(f"wrote {path.with_suffix('.json')} and {path}", flush=True)


def bars(axes: Any, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Draws the utility that each leader delivers through each follower, with its interval.

    Args:
      axes: of matplotlib.
      rows: of the table: leader, follower, utility, utility_95; those of other leaders are passed over.
      names: of the leaders, and of the followers that they were trained through.
    """
    for i, leader in enumerate(names):
        mine = [row for row in rows if row["leader"] == leader]
        places = np.arange(len(mine)) + 0.25 * (i - 1)
        values, errors = [row["utility"] for row in mine], [row["utility_95"] or 0 for row in mine]
        axes.bar(places, values, 0.22, yerr=errors, capsize=2, label=f"leader through {leader}")
    axes.set_xticks(range(len(names)), [f"answered by {name}" for name in names], fontsize=8)
    axes.set_ylabel("utility delivered, 95 % interval")


def curve(axes: Any, rows: Sequence[dict[str, Any]], x: str, y: str, name: str, **style: Any) -> None:
    """Draws a line through rows in order, with the intervals of y, in the colour and marker of a shaping.

    Args:
      axes: of matplotlib.
      rows: of the table.
      x, y: columns.
      name: of the shaping.
      style: further arguments of matplotlib.
    """
    colour, marker = STYLES[name]
    style = {"color": colour, "marker": marker, "label": name, "ms": 4.5, "lw": 1.3, "capsize": 2} | style
    axes.errorbar([r[x] for r in rows], [r[y] for r in rows], [r.get(f"{y}_95") or 0 for r in rows], **style)

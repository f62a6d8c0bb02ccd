"""python -m eval.studies infalign: win rates of transformed calibrated rewards against KL, alone and under best-of-N

The curves are integrals over the quantile of a reward without ties: they hold for every base, reward and prompt, and
need no model. With them what calibration costs when it rests on K samples, and what it gains over raw rewards at one KL
weight for prompts of different scale, both on random prompts solved exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, infalign
from jaxalign.types import Array

from . import calibration, common

STYLES: dict[str, tuple[str, str]] = {
    "identity": ("black", "s"),
    "log": ("#999999", "P"),
    "exp:5": ("#E69F00", "^"),
    "exp:10": ("#D55E00", "v"),
    "exp:-5": ("#56B4E9", "<"),
    "exp:-10": ("#0072B2", ">"),
    "power": ("#CC79A7", "D"),
    "optimum": ("#009E73", "o"),
}
"""Transform -> (colour, marker): Okabe and Ito's colours."""

PROCEDURES = {"best_of_n": ("exp:5", "exp:10", "exp:20"), "worst_of_n": ("exp:-5", "exp:-10", "exp:-20")}
"""Column of `infalign.Curve` -> the exponentials made for it."""


@dataclasses.dataclass(frozen=True)
class Config(calibration.Options):
    """Options of eval.studies infalign."""

    n: tuple[int, ...] = (2, 4, 8, 32)
    """The N of best-of-N and worst-of-N; the figure shows 4, or the first where 4 is not among them."""
    kls: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0)
    """KL to the base at which the tables compare [nats]."""


def transform_of(name: str, n: int, procedure: str) -> infalign.Transform:
    """Gives a transform by its name on a command line.

    Args:
      name: as `parse_transform` reads it, or "power" for that of the procedure.
      n: the N of the procedure.
      procedure: "best_of_n" or "worst_of_n".

    Returns:
      A Transform.
    """
    return infalign.parse_transform(f"{'bon' if procedure == 'best_of_n' else 'won'}:{n}" if name == "power" else name)


def optimum(procedure: str, n: int, kls: Any) -> tuple[np.ndarray, infalign.Curve]:
    """Gives the optimal transform at given KL: a sweep of beta, then secants in log beta against log KL.

    Args:
      procedure: "best_of_n" or "worst_of_n".
      n: its N.
      kls: [KL], in nats.

    Returns:
      (beta, Curve), [KL] each; NaN where the KL needs a beta below the sweep.
    """
    runs = infalign.best_of(n) if procedure == "best_of_n" else infalign.worst_of(n)
    wanted = np.log(np.asarray(kls))
    sweep = np.linspace(np.log(1e-5), np.log(4.0), max(len(wanted), 32))

    def at(log_beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """(log KL, residual, curve); repeated to the sweep's length, so that all calls are one program."""
        found = infalign.optimal_transform(runs, beta=jnp.exp(np.resize(log_beta, len(sweep))), steps=1000)
        rates = [np.asarray(x)[: len(log_beta)] for x in infalign.curve(found.log_policy, n=n)]
        return np.log(rates[0]), np.asarray(found.residual)[: len(log_beta)], rates

    log_kl = at(sweep)[0]
    log_beta = np.interp(wanted, log_kl[::-1], sweep[::-1])
    slope = np.interp(wanted, log_kl[::-1], np.gradient(sweep, log_kl)[::-1])
    log_kl, residual, rates = at(log_beta)
    for _ in range(4):
        step = np.clip(slope * (wanted - log_kl), -0.5, 0.5)
        before = log_kl
        log_beta = log_beta + step
        log_kl, residual, rates = at(log_beta)
        moved = log_kl - before
        slope = np.where(np.abs(moved) > 1e-9, step / np.where(moved == 0, 1, moved), slope)
    met = (np.abs(log_kl - wanted) < 1e-5) & (residual < 1e-8)
    kl, *won = (jnp.asarray(np.where(met, x, np.nan)) for x in rates)
    return np.where(met, np.exp(log_beta), np.nan), infalign.Curve(kl, *won)


def curves(procedure: str, n: int, kls: Any, names: Sequence[str]) -> dict[str, tuple[Any, infalign.Curve]]:
    """Gives the curve of each transform at given KL.

    Args:
      procedure: "best_of_n" or "worst_of_n".
      n: its N.
      kls: [KL], in nats.
      names: of the transforms.

    Returns:
      name -> (beta, Curve), [KL] each.
    """
    found: dict[str, tuple[Any, infalign.Curve]] = {}
    for name in names:
        if name == "optimum":
            found[name] = optimum(procedure, n, kls)
            continue
        transform = transform_of(name, n, procedure)
        beta = infalign.match_kl(transform, kl=jnp.asarray(kls))
        found[name] = (beta, infalign.tilted_curve(transform, beta=beta, n=n))
    return found


def tables(config: Config) -> list[dict[str, Any]]:
    """Rows of win rates at equal KL: a row per N and KL, a column per transform."""
    rows: list[dict[str, Any]] = []
    plain = curves("best_of_n", 1, config.kls, ("identity", "log", "exp:5", "exp:10"))
    for k, kl in enumerate(config.kls):
        row: dict[str, Any] = {"win rate": "alone", "N": 1, "KL": f"{kl:g}"}
        rows.append(row | {name: float(found.win_rate[k]) for name, (_, found) in plain.items()})
    for procedure, exponentials in PROCEDURES.items():
        for n in config.n:
            every = curves(procedure, n, config.kls, ("identity", "log", *exponentials, "power", "optimum"))
            beta, best = every["optimum"]
            for k, kl in enumerate(config.kls):
                row = {"win rate": procedure.replace("_n", "_N").replace("_", " "), "N": n, "KL": f"{kl:g}"}
                row |= {name: float(getattr(found, procedure)[k]) for name, (_, found) in every.items()}
                row |= {"its W alone": float(best.win_rate[k]), "its beta": float(beta[k])}
                rows.append({name: None if value != value else value for name, value in row.items()})
    return rows


@functools.partial(jax.jit, static_argnames=("procedure", "n"))
def _by_exponent(a: Array, kls: Array, *, procedure: str, n: int) -> Array:
    """Win rates [a, KL] under a procedure of exponentials of strengths |a| [a] at given KL."""

    def of(a: Array) -> Array:
        def transform(c: Array) -> Array:
            if procedure == "worst_of_n":
                return jnp.expm1(-a * c) / jnp.expm1(-a)
            return jnp.exp(a * (c - 1)) * jnp.expm1(-a * c) / jnp.expm1(-a)

        found = infalign.tilted_curve(transform, beta=infalign.match_kl(transform, kl=kls), n=n)
        rates: Array = getattr(found, procedure)
        return rates

    return jax.vmap(of)(a)


def best_exponents(config: Config) -> list[dict[str, Any]]:
    """Rows of the exponential that comes closest to the optimum, sought over |a| from 1 to 160."""
    strengths = jnp.geomspace(1.0, 160.0, 128)
    rows: list[dict[str, Any]] = []
    for procedure, n in itertools.product(PROCEDURES, [n for n in config.n if n <= 8]):
        kls = [kl for kl in config.kls if procedure == "best_of_n" or kl <= 0.5]
        if kls:
            rates = np.asarray(_by_exponent(strengths, jnp.asarray(kls), procedure=procedure, n=n))
            best = optimum(procedure, n, kls)[1]
            for k, kl in enumerate(kls):
                at = int(np.nanargmax(rates[:, k]))
                row = {"best |a| under": procedure.replace("_n", "_N").replace("_", " "), "N": n, "KL": f"{kl:g}"}
                row |= {"|a|": round(float(strengths[at]), 1), "win rate": float(rates[at, k])}
                rows.append(row | {"optimum": float(getattr(best, procedure)[k])})
    return rows


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes infalign.json and infalign.png."""
    common.check(config)
    with jax.enable_x64(True):
        prompts = calibration.random_prompts(config)
        rows = (
            tables(config)
            + best_exponents(config)
            + calibration.finite_tables(config, prompts)
            + calibration.equal_mean_kl(config, prompts)
        )
        out = common.report("infalign", config, rows, digits=4)
        draw(config, out)
    return rows


def draw(config: Config, out: Any) -> None:
    """Three panels: alone, under best-of-N, under worst-of-N."""
    n = 4 if 4 in config.n else config.n[0]
    kls = np.concatenate([np.geomspace(0.004, 0.08, 8), np.arange(4, 21) / 40, np.arange(11, 31) / 20])
    marked = [1 + int(np.argmin(np.abs(kls - at))) for at in (0.1, 0.3, 0.5, 0.8, 1.2)]
    names = ("identity", "log", "exp:5", "exp:10", "exp:-5", "exp:-10")
    panels = {
        "win_rate": ("win rate, nothing on top", curves("best_of_n", n, kls, names)),
        "best_of_n": (f"win rate under best of {n}", curves("best_of_n", n, kls, (*names, "optimum"))),
        "worst_of_n": (f"win rate under worst of {n}", curves("worst_of_n", n, kls, (*names, "optimum"))),
    }
    figure, every = common.pyplot().subplots(1, 3, figsize=(13.5, 4.6), layout="constrained", sharey=True)
    for axes, (column, (title, found)) in zip(every, panels.items(), strict=True):
        for name, (_, rates) in found.items():
            colour, marker = STYLES[name]
            style = {"color": colour, "marker": marker, "ms": 4.5, "markevery": marked, "lw": 1.3}
            if name == "optimum":
                style |= {"ls": "--", "mfc": "none", "ms": 8}
            axes.plot([0, *kls], [0.5, *getattr(rates, column)], **style)
        labels(axes, {name: float(getattr(rates, column)[-1]) for name, (_, rates) in found.items()})
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="KL to the base [nats]", xlim=(0, 1.5), ylim=(0.5, 1.005))
        axes.grid(alpha=0.25)
    every[0].set_ylabel("win rate against the base")
    common.save(figure, out / "infalign.png")


def labels(axes: Any, ends: dict[str, float], *, gap: float = 0.03) -> None:
    """Names beside the right ends of their curves, moved apart where they would overlap."""
    order = sorted(ends, key=lambda name: ends[name])
    place = np.array([ends[name] for name in order])
    for _ in range(200):
        for i in range(len(place) - 1):
            short = gap - (place[i + 1] - place[i])
            if short > 0:
                place[i] -= short / 2
                place[i + 1] += short / 2
        top = 1.0
        for i in reversed(range(len(place))):
            place[i] = min(place[i], top)
            top = place[i] - gap
    for name, y in zip(order, place, strict=True):
        axes.annotate(
            name,
            (1.5, ends[name]),
            (1.62, y),
            annotation_clip=False,
            color=STYLES[name][0],
            fontsize=8.5,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": STYLES[name][0],
                "lw": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

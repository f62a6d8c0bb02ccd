"""python -m eval.frontier infalign: win rates of transformed calibrated rewards against KL, alone and under best-of-N

The curves are integrals over the quantile of a reward without ties: they hold for every base, reward and prompt, and
need no model. With them what calibration costs when it rests on K samples, and what it gains over raw rewards at one KL
weight for prompts of different scale, both on random prompts solved exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.frontier import common
from jaxalign import cli, gibbs, infalign
from jaxalign.types import Array

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
class Config(common.Options):
    """Options of eval.frontier infalign."""

    n: tuple[int, ...] = (2, 4, 8, 32)
    """The N of best-of-N and worst-of-N; the figure shows 4, or the first where 4 is not among them."""
    kls: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0)
    """KL to the base at which the tables compare [nats]."""
    prompts: int = 200
    """Random prompts of the finite tables and of equal mean KL."""
    outcomes: int = 64
    """Outcomes of each."""
    tables: tuple[int, ...] = (4, 8, 16, 32, 100, 1000)
    """Base samples K per prompt that calibration rests on."""
    mean_kl: float = 0.5
    """Mean KL over prompts of both [nats]."""


def transform_of(name: str, n: int, procedure: str) -> infalign.Transform:
    """A transform by its name on a command line; "power" is that of the procedure."""
    return infalign.parse(f"{'bon' if procedure == 'best_of_n' else 'won'}:{n}" if name == "power" else name)


def optimum(procedure: str, n: int, kls: Any) -> tuple[np.ndarray, infalign.Curve]:
    """(beta, curve), [KL] each, of the optimal transform at given KL: by secants in log beta from a coarse sweep. NaN
    where the fixed point was not reached."""
    runs = infalign.best_of(n) if procedure == "best_of_n" else infalign.worst_of(n)

    def at(log_beta: np.ndarray) -> tuple[np.ndarray, infalign.Curve, np.ndarray]:
        found = infalign.optimal_transform(runs, jnp.exp(log_beta), steps=1000)
        rates = infalign.curve(found.log_policy, n=n)
        return np.log(np.asarray(rates.kl)), rates, np.asarray(found.residual)

    wanted = np.log(np.asarray(kls))
    sweep = np.linspace(np.log(1e-5), np.log(4.0), max(len(wanted), 32))
    log_kl, _, residual = at(sweep)
    good = residual < 1e-8
    log_beta = np.interp(wanted, log_kl[good][::-1], sweep[good][::-1])
    # To the sweep's length, so that all calls are one program.
    pad = lambda x: np.resize(x, len(sweep))  # noqa: E731
    slope = np.interp(wanted, log_kl[good][::-1], np.gradient(sweep[good], log_kl[good])[::-1])
    log_kl = at(pad(log_beta))[0][: len(wanted)]
    for _ in range(4):
        moved = log_beta + np.clip(slope * (wanted - log_kl), -0.5, 0.5)
        new_kl, rates, residual = at(pad(moved))
        new_kl, change = new_kl[: len(wanted)], new_kl[: len(wanted)] - log_kl
        slope = np.where(np.abs(change) > 1e-9, (moved - log_beta) / np.where(change == 0, 1, change), slope)
        log_beta, log_kl = moved, new_kl
    met = (np.abs(log_kl - wanted) < 1e-5) & (residual[: len(wanted)] < 1e-8)
    curve = infalign.Curve(*(np.where(met, np.asarray(x)[: len(wanted)], np.nan) for x in rates))  # type: ignore[arg-type]
    return np.where(met, np.exp(log_beta), np.nan), curve


def curves(procedure: str, n: int, kls: Any, names: Sequence[str]) -> dict[str, tuple[Any, infalign.Curve]]:
    """transform -> (beta, curve), [KL] each, at given KL."""
    found: dict[str, tuple[Any, infalign.Curve]] = {}
    for name in names:
        if name == "optimum":
            found[name] = optimum(procedure, n, kls)
            continue
        transform = transform_of(name, n, procedure)
        beta = infalign.match_kl(transform, jnp.asarray(kls))
        found[name] = (beta, infalign.tilted_curve(transform, beta, n=n))
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

        return getattr(infalign.tilted_curve(transform, infalign.match_kl(transform, kls), n=n), procedure)

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


class Prompts(NamedTuple):
    """Random prompts, [prompts, outcomes]. log_base; reward ~ N(0,1) without ties, rank: its order."""

    log_base: Array
    reward: Array
    rank: Array


def random_prompts(config: Config) -> Prompts:
    rng = np.random.default_rng(config.seed)
    log_base = np.log(rng.dirichlet(np.ones(config.outcomes), config.prompts))
    reward = rng.normal(size=log_base.shape)
    return Prompts(jnp.asarray(log_base), jnp.asarray(reward), infalign.levels(reward))


@functools.partial(jax.jit, static_argnames="kl")
def at_mean_kl(log_base: Array, reward: Array, *, kl: float) -> Array:
    """log of the tilted policies [prompts, outcomes] of the one beta at which their mean KL to the base is `kl`."""

    def policy(log_beta: Array) -> Array:
        return gibbs.log_policy(log_base, reward, beta=jnp.exp(log_beta))

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        above = gibbs.kl(policy(middle), log_base).mean() > kl
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (jnp.log(1e-6) + 0 * reward.sum(), jnp.log(1e4) + 0 * reward.sum()))
    return policy((low + high) / 2)


GOALS = {
    "identity, alone": ("identity", infalign.none()),
    "exp:10, best of 4": ("exp:10", infalign.best_of(4)),
    "exp:-10, worst of 4": ("exp:-10", infalign.worst_of(4)),
}


def finite_tables(config: Config, prompts: Prompts) -> list[dict[str, Any]]:
    """Rows of win rates where the calibrated reward rests on K base samples a prompt."""
    base = jnp.exp(prompts.log_base)
    rng = np.random.default_rng([config.seed, 1])
    rows = []
    for size in (*config.tables, None):
        row: dict[str, Any] = {"samples K": "exact" if size is None else str(size)}
        c = infalign.mid_rank(base, prompts.rank)
        if size is not None:
            law = np.asarray(base) / np.asarray(base).sum(-1, keepdims=True)
            drawn = np.stack([rng.choice(config.outcomes, size, p=p) for p in law])
            c = infalign.calibrate(prompts.reward, jnp.take_along_axis(prompts.reward, jnp.asarray(drawn), axis=-1))
        for goal, (text, procedure) in GOALS.items():
            policy = jnp.exp(at_mean_kl(prompts.log_base, infalign.parse(text)(c), kl=config.mean_kl))
            row |= common.estimate(goal, infalign.procedure_win_rate(policy, base, prompts.rank, procedure))
        rows.append(row)
    return rows


def equal_mean_kl(config: Config, prompts: Prompts) -> list[dict[str, Any]]:
    """Rows of win rates with one beta for all prompts, whose rewards have scales e^N(0,1)."""
    rng = np.random.default_rng([config.seed, 2])
    base = jnp.exp(prompts.log_base)
    raw = prompts.reward * np.exp(rng.normal(size=(config.prompts, 1)))
    mean = (base * raw).sum(-1, keepdims=True)
    deviation = jnp.sqrt((base * (raw - mean) ** 2).sum(-1, keepdims=True))
    rewards = {"raw": raw, "z-score": (raw - mean) / deviation, "calibrated": infalign.mid_rank(base, prompts.rank)}
    rows = []
    for name, reward in rewards.items():
        policy = at_mean_kl(prompts.log_base, reward, kl=config.mean_kl)
        kl = gibbs.kl(policy, prompts.log_base)
        found = common.estimate("win rate alone", infalign.win_rate(jnp.exp(policy), base, prompts.rank))
        rows.append({"reward at one beta": name} | found | {"mean KL": float(kl.mean()), "largest KL": float(kl.max())})
    return rows


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes infalign.json and infalign.png."""
    common.check(config)
    with jax.enable_x64(True):
        prompts = random_prompts(config)
        rows = tables(config) + best_exponents(config) + finite_tables(config, prompts) + equal_mean_kl(config, prompts)
        out = common.report("infalign", config, rows, digits=4)
        draw(config, out)
    return rows


def draw(config: Config, out: Any) -> None:
    """Three panels: alone, under best-of-N, under worst-of-N."""
    n = 4 if 4 in config.n else config.n[0]
    kls = np.concatenate([np.geomspace(0.004, 0.08, 8), np.arange(4, 21) / 40, np.arange(11, 31) / 20])
    marked = [1 + int(np.abs(kls - at).argmin()) for at in (0.1, 0.3, 0.5, 0.8, 1.2)]
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
    run(cli.parse(Config, description=__doc__ or "", args=args))

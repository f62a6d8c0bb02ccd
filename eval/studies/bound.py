"""python -m eval.studies bound: KL of followers of rewards in [0, B], and the sharp bound on it

Random bases and random rewards in the box, interior and at its corners, against the bound z − 1 − log z,
z = L/(1 − e^−L), L = B/beta, and against its two simple majorants L and L²/8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxalign import commands, gibbs, shaping

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies bound."""

    cases: int = 20_000
    """Random problems."""
    responses: int = 12
    """Responses of each."""
    largest: float = 20.0
    """Largest gain B/beta [1]."""


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes bound.json and bound.png."""
    common.check(config)
    rng = np.random.default_rng(config.seed)
    with jax.enable_x64(True):
        size = (config.cases, config.responses)
        gain = np.exp(rng.uniform(np.log(0.1), np.log(config.largest), config.cases))
        utility = rng.normal(size=size)
        log_base = jax.nn.log_softmax(rng.uniform(0, 6, (config.cases, 1)) * rng.normal(size=size))
        m = shaping.optimal_threshold(utility, log_base=log_base, gain=gain)
        rewards: dict[str, Any] = {
            "uniform in the box": rng.uniform(size=size) * gain[:, None],
            "corners of the box": (rng.uniform(size=size) < 0.4) * gain[:, None],
            "threshold": shaping.threshold_reward(utility, threshold=m, bound=gain),
        }
        limit = shaping.kl_bound(gain)
        kls = {
            name: np.asarray(gibbs.kl(gibbs.log_policy(log_base, r, beta=1.0), log_base)) for name, r in rewards.items()
        }
        rows: list[dict[str, Any]] = []
        for name, kl in kls.items():
            row = {"reward": name, "largest_share_of_bound": float((kl / np.asarray(limit)).max())}
            rows.append(row | {"exceeding": int((kl > limit * (1 + 1e-9)).sum())} | common.estimate("kl", kl))
        for at in (1.0, 2.0, 3.0, 5.0, 10.0):
            rows.append({"gain": at, "bound": float(shaping.kl_bound(at)), "min(L, L²/8)": min(at, at**2 / 8)})
        grid = np.geomspace(0.1, config.largest, 200)
        curve = np.asarray(shaping.kl_bound(grid))
    out = common.report("bound", config, rows)
    figure, axes = common.pyplot().subplots(figsize=(6.4, 4.2), layout="constrained")
    colours = {"uniform in the box": "#999999", "corners of the box": "#E69F00", "threshold": "#0072B2"}
    for name, kl in kls.items():
        axes.plot(gain, kl, ".", ms=1.5, alpha=0.35, color=colours[name], rasterized=True)
        axes.plot([], [], ".", ms=8, color=colours[name], label=f"reward: {name}")
    axes.plot(grid, curve, color="black", lw=1.6, label="sharp bound")
    axes.plot(grid, np.minimum(grid, grid**2 / 8), color="black", lw=1, ls=":", label="min(L, L²/8)")
    axes.set(xscale="log", yscale="log", ylim=(1e-4, 30), xlabel="gain L = B/beta", ylabel="KL to the base [nats]")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.grid(alpha=0.25)
    common.save(figure, out / "bound.png")
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

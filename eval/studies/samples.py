"""python -m eval.studies samples: the threshold from few samples: how low it comes out, and what that costs

Utility ~ N(0,1) under the base. Left: the threshold estimated from n samples, beside the true one. Right: the share of
the true optimum that the estimated threshold delivers, in closed form: its loss is of second order in its error.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, shaping

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies samples."""

    sizes: tuple[int, ...] = (2, 4, 8, 10, 16, 32, 64, 128, 256)
    """Base samples n per prompt."""
    gains: tuple[float, ...] = (1.0, 3.0, 6.0)
    """Gains bound/beta [1]."""
    prompts: int = 4000
    """Prompts per size: independent draws of the samples."""


def delivered(threshold: Any, gain: float) -> jax.Array:
    """Gives E[u] of the follower of a threshold reward, u ~ N(0,1): (k−1)·phi(m)/(1 + (k−1)·Pr(u > m)), k = e^gain.

    Args:
      threshold: m, any shape.
      gain: bound/beta.

    Returns:
      In m's shape.
    """
    density = jnp.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    above = jax.scipy.stats.norm.sf(threshold)
    return math.expm1(gain) * density / (1 + math.expm1(gain) * above)


def true_threshold(gain: float) -> float:
    """Gives m* of a normal utility: the fixed point of `delivered`, which is its maximum as well.

    Args:
      gain: bound/beta.

    Returns:
      m*.
    """
    m = jnp.zeros(())
    for _ in range(200):
        m = delivered(m, gain)
    return float(m)


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes samples.json and samples.png."""
    common.check(config)
    rows: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        for gain in config.gains:
            best = true_threshold(gain)
            for n in config.sizes:
                drawn = np.random.default_rng([config.seed, n]).normal(size=(config.prompts, n))
                found = shaping.optimal_threshold(drawn, gain=gain)
                row = {"gain": gain, "n": n, "true_threshold": best} | common.estimate("threshold", found)
                row["deviation"] = float(found.std())
                rows.append(row | common.estimate("share_of_optimum", delivered(found, gain) / best))
    out = common.report("samples", config, rows)
    figure, panels = common.pyplot().subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for gain, colour in zip(config.gains, ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00"), strict=False):
        mine = [r for r in rows if r["gain"] == gain]
        sizes = [r["n"] for r in mine]
        style = {"color": colour, "marker": "o", "ms": 4}
        panels[0].errorbar(
            sizes,
            [r["threshold"] for r in mine],
            [r["deviation"] for r in mine],
            capsize=2,
            label=f"gain {gain:g}",
            **style,
        )
        panels[0].axhline(mine[0]["true_threshold"], color=colour, ls="--", lw=1)
        panels[1].plot(sizes, [r["share_of_optimum"] for r in mine], label=f"gain {gain:g}", **style)
    panels[0].set(ylabel="estimated threshold, ± one deviation")
    panels[0].set_title("estimated from n samples (dashed: true)", fontsize=10)
    panels[1].set(ylabel="utility delivered / optimum")
    panels[1].set_title("what the estimate delivers", fontsize=10)
    panels[1].axhline(1, color="0.8", lw=1)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(config.sizes, [f"{n}" for n in config.sizes], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("base samples per prompt")
        axes.grid(alpha=0.25)
    panels[1].legend(frameon=False, fontsize=8)
    common.save(figure, out / "samples.png")
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

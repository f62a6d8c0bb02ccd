"""python -m eval.studies noise: when the reward is gold plus an error: light tails or heavy, at equal KL

n responses of equal base weight, gold ~ N(0,1), proxy = gold + an error: Gaussian, Student's t with 2 degrees of
freedom, Cauchy. The leader and the follower see the proxy alone. For each gain, the threshold reward, and the other
shapings scaled to the threshold's KL, or to the largest that they reach; what counts is gold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, gibbs, infalign, shaping

from . import common

ERRORS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "Gaussian": lambda rng, shape: rng.normal(size=shape),
    "Student t(2)": lambda rng, shape: rng.standard_t(2, shape),
    "Cauchy": lambda rng, shape: rng.standard_cauchy(shape),
}


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies noise."""

    responses: int = 4000
    """Responses n per problem."""
    seeds: int = 40
    """Problems per kind of error."""
    scale: float = 1.0
    """Scale of the error [standard deviations of gold]."""
    gains: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """Gains bound/beta of the threshold [1]."""
    sharpness: float = 1.5
    """Of the soft threshold [per unit of proxy]."""
    samples: int = 64
    """Base samples that PAR and calibration compare a response with."""


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes noise.json and noise.png."""
    common.check(config)
    rows: list[dict[str, Any]] = []
    shape = (config.seeds, config.responses)
    with jax.enable_x64(True):
        log_base = jnp.full(shape, -np.log(config.responses))
        for k, (error, draw) in enumerate(ERRORS.items()):
            rng = np.random.default_rng([config.seed, k])
            gold = jnp.asarray(rng.normal(size=shape))
            proxy = gold + config.scale * jnp.asarray(draw(rng, shape))
            par = shaping.preference_as_reward(proxy, reference=proxy[:, : config.samples])
            ranks = infalign.calibrate(proxy, reference=proxy[:, : config.samples])
            for gain in config.gains:
                m = shaping.optimal_threshold(proxy, log_base=log_base, gain=gain)
                policy = gibbs.log_policy(log_base, shaping.threshold_reward(proxy, threshold=m, bound=gain), beta=1.0)
                budget = gibbs.kl(policy, log_base)
                soft = shaping.soft_threshold_reward(proxy, threshold=m, bound=1.0, sharpness=config.sharpness)
                policies = {"threshold": policy}
                rank = shaping.optimal_threshold(ranks, log_base=log_base, gain=gain)
                above = shaping.threshold_reward(ranks, threshold=rank, bound=1.0)
                scaled = {"raw": proxy, "soft threshold": soft, "PAR": par, "calibrated": ranks}
                for name, reward in (scaled | {"calibrated, threshold": above}).items():
                    beta = gibbs.match_kl(log_base, reward, kl=budget)
                    policies[name] = gibbs.log_policy(log_base, reward, beta=beta)
                base = gold.mean(-1)
                raw = gibbs.utility(policies["raw"], gold) - base
                for name, found in policies.items():
                    gain_in_gold = gibbs.utility(found, gold) - base
                    row = {"error": error, "gain": gain, "shaping": name}
                    row |= common.estimate("kl", gibbs.kl(found, log_base)) | common.estimate("gold_gain", gain_in_gold)
                    row |= common.estimate("over_raw", gain_in_gold - raw)
                    row |= common.estimate("proxy_gain", gibbs.utility(found, proxy) - proxy.mean(-1))
                    rows.append(row)
    out = common.report("noise", config, rows)
    figure, panels = common.pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    for axes, error in zip(panels, ERRORS, strict=True):
        for name in ("raw", "PAR", "calibrated", "calibrated, threshold", "soft threshold", "threshold"):
            common.curve(
                axes, [r for r in rows if r["error"] == error and r["shaping"] == name], "kl", "gold_gain", name
            )
        axes.axhline(0, color="0.8", lw=1, zorder=0)
        axes.set_title(f"error of the proxy: {error}", fontsize=10)
        axes.set_xlabel("KL to the base [nats]")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("gold gained over the base, 95 % interval")
    panels[0].legend(frameon=False, fontsize=8)
    common.save(figure, out / "noise.png")
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

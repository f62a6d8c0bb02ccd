"""python -m eval.studies world: shapings of a learned reward on the embedded world, by samples and by tokens

Reads the folder of a finished train.quickstart. Left and middle: n base samples per held-out prompt stand for the base,
so that the follower of every shaped reward is exact on them, at equal beta and at equal KL; the reward is learned, the
world's program is gold. Right: decoders by tokens, beside the exact follower of the raw reward.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, critics, gibbs, models, policies, shaping
from jaxalign.types import Array

from . import base, common

HEAD_BOUNDS = (2.0, 6.0, 12.0)
"""Bounds of the followers that are read from the quickstart's head of laws."""


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies world."""

    run: str = "runs/quickstart"
    """Folder of a finished train.quickstart."""
    samples: int = 256
    """Base samples per held-out prompt."""
    bound: float = 6.0
    """Bound B of the shaped rewards [units of the learned reward]."""
    sharpness: float = 1.5
    """Of the sigmoids [per unit of reward]."""
    betas: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0, 0.67, 0.5)
    """KL weights [units of reward per nat]."""
    budgets: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
    """KL at which the shapings are compared [nats]; log n is the most that samples can show."""
    decode_betas: tuple[float, ...] = (2.0, 1.0, 0.5)
    """KL weights of the decoders by tokens [units of reward per nat]."""
    responses: int = 4
    """Responses per prompt of each decoder by tokens."""


def measure(policy: Array, found: base.Responses) -> dict[str, np.ndarray]:
    """Per prompt: gold, proxy, KL and effective samples under weights exp(policy) [P,n] over its base samples."""
    uniform = jnp.full(policy.shape, -np.log(policy.shape[-1]))
    return {
        "gold": np.asarray(gibbs.utility(policy, found.gold)),
        "proxy": np.asarray(gibbs.utility(policy, found.proxy)),
        "kl": np.asarray(gibbs.kl(policy, uniform)),
        "effective_samples": np.asarray(jnp.exp(-jax.nn.logsumexp(2 * policy, axis=-1))),
    }


def row_of(about: dict[str, Any], got: dict[str, np.ndarray]) -> dict[str, Any]:
    """One row: estimates over prompts."""
    row = dict(about)
    for name in ("gold", "proxy", "kl"):
        row |= common.estimate(name, got[name])
    return row | {"effective_samples": float(got["effective_samples"].mean())}


def by_samples(config: Config, found: base.Responses) -> list[dict[str, Any]]:
    """Rows of the followers on the samples, at equal beta and at equal KL."""
    utility = jnp.asarray(found.proxy)
    uniform = jnp.full(utility.shape, -np.log(utility.shape[-1]))
    rows = [row_of({"at": "base", "shaping": "base"}, measure(uniform, found))]
    for beta in config.betas:
        for name, shape in common.shapes(config.bound, beta, sharpness=config.sharpness).items():
            policy = gibbs.log_policy(uniform, shape(utility, utility), beta=beta)
            rows.append(row_of({"at": "equal beta", "beta": beta, "shaping": name}, measure(policy, found)))
    gains = jnp.geomspace(0.05, 30, 200)[:, None]
    m = shaping.optimal_threshold(utility, gain=gains)
    shaped = shaping.threshold_reward(jnp.broadcast_to(utility, (200, *utility.shape)), threshold=m, bound=gains)
    path = gibbs.log_policy(uniform, shaped, beta=1.0)
    kl = gibbs.kl(path, uniform)
    every = common.shapes(config.bound, 1.0, sharpness=config.sharpness)
    for budget in config.budgets:
        best = jnp.where((kl <= budget).any(0), 199 - (kl <= budget)[::-1].argmax(0), 0)
        policies_ = {"threshold": path[best, jnp.arange(utility.shape[0])]}
        for name in ("raw", "Cap", "mean sigmoid", "log sigmoid", "PAR", *common.CALIBRATED, "soft threshold"):
            shaped = every[name](utility, utility)
            policies_[name] = gibbs.log_policy(uniform, shaped, beta=gibbs.match_kl(uniform, shaped, kl=budget))
        raw = measure(policies_["raw"], found)["gold"]
        for name, policy in policies_.items():
            got = measure(policy, found)
            row = row_of({"at": "equal KL", "budget": budget, "shaping": name}, got)
            rows.append(row | common.estimate("gold_over_raw", got["gold"] - raw))
    return rows


def error_of(found: base.Responses) -> list[dict[str, Any]]:
    """How the learned reward errs: what is left of it, within prompts, after its best line in gold."""

    def inside(x: np.ndarray) -> np.ndarray:
        centred: np.ndarray = (x - x.mean(axis=1, keepdims=True)).ravel()
        return centred

    proxy, gold = inside(found.proxy), inside(found.gold)
    left = proxy - gold * (proxy @ gold) / (gold @ gold)
    left = left / left.std()
    rows = {
        "correlation with gold": float(np.corrcoef(proxy, gold)[0, 1]),
        "excess kurtosis": float((left**4).mean() - 3),
    }
    rows["share beyond 3 deviations"] = float((np.abs(left) > 3).mean())
    return [{"at": "error of the learned reward", "what": name, "value": x} for name, x in rows.items()]


def by_tokens(config: Config, world: base.World) -> list[dict[str, Any]]:
    """Rows of the decoders by tokens: each draws a few responses per prompt."""
    lm, params = world.base
    policy = policies.language_model(lm)
    shaped_head = base.train_head(world, "srs_cd", "fudge", bound=config.bound, sharpness=config.sharpness)
    raw_head = models.load(str(world.folder / "value" / "model"))
    runs: list[tuple[str, str, float, Any, Any, int | None]] = []
    for beta in config.decode_betas:
        runs.append(("raw", "CD value head", beta, critics.value(raw_head[0]), raw_head[1], None))
        runs.append(("soft threshold", "CD value head", beta, critics.value(shaped_head[0]), shaped_head[1], None))
        args = critics.args(world.reward_model[0])
        runs.append(("raw", "ARGS", beta, args, world.reward_model[1], 10))
        over = critics.shaped_over_candidates(
            args, beta=beta, sharpness=config.sharpness, range_factor=1.01, max_gain=float(np.log(2))
        )
        runs.append(
            (
                "soft threshold",
                "ARGS",
                beta,
                over,
                {"critic": world.reward_model[1], "map": jnp.asarray(config.bound)},
                10,
            )
        )
    head = raw_head[0].config.head
    assert head is not None
    for bound in HEAD_BOUNDS if head.distribution is not None else ():
        follower = critics.follower(raw_head[0], beta=1.0, bound=bound)
        runs.append(("threshold", f"head of laws, B {bound:g}", 1.0, follower, raw_head[1], None))
    rows = []
    for name, decoder, beta, critic, critic_params, k in runs:
        arguments = {"policy": params, "critic": critic_params, "beta": jnp.asarray(beta, jnp.float32)}
        tilted = policies.tilt(policy, critic, top_k=k)
        got = base.respond(world, tilted, arguments, n=config.responses, seed=config.seed)
        row = {"at": "by tokens", "beta": beta, "shaping": name, "decoder": decoder}
        for column in ("gold", "proxy", "kl"):
            row |= common.estimate(column, getattr(got, column).mean(axis=1))
        rows.append(row)
        print(f"by tokens: {name}, {decoder}, beta {beta:g}: gold {row['gold']:.2f} at KL {row['kl']:.2f}", flush=True)
    return rows


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes world.json and world.png."""
    common.check(config)
    world = base.load(config.run)
    found = base.base_samples(world, n=config.samples, seed=config.seed)
    with jax.enable_x64(True):
        rows = by_samples(config, found)
    rows += error_of(found) + by_tokens(config, world)
    out = common.report("world", config, rows)
    _draw(config, rows, out)
    return rows


def _draw(config: Config, rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    figure, panels = common.pyplot().subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    start = next(r for r in rows if r["at"] == "base")
    for axes, at, x, y in (
        (panels[0], "equal beta", "beta", "gold"),
        (panels[1], "equal KL", "budget", "gold_over_raw"),
    ):
        for name in common.STYLES:
            mine = [r for r in rows if r["at"] == at and r["shaping"] == name]
            if mine:
                common.curve(axes, mine, x, y, name)
    panels[0].axhline(start["gold"], color="0.7", lw=1, zorder=0)
    panels[0].set_ylabel("true utility (gold)")
    panels[1].set_ylabel("gold minus the raw reward's, paired by prompt")
    panels[0].set_xscale("log")
    panels[0].invert_xaxis()
    panels[0].set_xticks(config.betas, [f"{b:g}" for b in config.betas])
    panels[0].minorticks_off()
    panels[0].set_xlabel(f"beta, bound {config.bound:g}")
    panels[0].set_title("followers on base samples, equal beta", fontsize=10)
    panels[0].legend(frameon=False, fontsize=7.5)
    panels[1].set_xlabel("KL to the base [nats]")
    panels[1].set_title("followers on base samples, equal KL", fontsize=10)
    axes = panels[2]
    exact = [r for r in rows if r["at"] == "equal KL" and r["shaping"] == "raw"]
    axes.plot([r["kl"] for r in exact], [r["gold"] for r in exact], color="0.4", ls="--", label="raw, exact follower")
    lines = {"CD value head": "o", "ARGS": "v"}
    for decoder, marker in lines.items():
        for name in ("raw", "soft threshold"):
            mine = [r for r in rows if r.get("decoder") == decoder and r["shaping"] == name]
            common.curve(axes, mine, "kl", "gold", name, marker=marker, label=f"{name}, {decoder}")
    mine = sorted((r for r in rows if "head of laws" in str(r.get("decoder"))), key=lambda r: r["kl"])
    if mine:
        common.curve(axes, mine, "kl", "gold", "threshold", marker="P", label="threshold, head of laws")
    axes.axhline(start["gold"], color="0.7", lw=1, zorder=0)
    axes.set(xlabel="KL to the base [nats]", ylabel="true utility (gold)")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xticks([0, 0.5, 1, 2, 4, 8], ["0", "0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set_title("decoders by tokens", fontsize=10)
    axes.legend(frameon=False, fontsize=7.5)
    for axes in panels:
        axes.grid(alpha=0.25)
    common.save(figure, out / "world.png")


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

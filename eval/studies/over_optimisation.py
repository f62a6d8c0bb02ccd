"""python -m eval.studies over_optimisation: what a learned reward costs when it is maximised hard, and what helps

Reads the folder of a finished train.quickstart. A reward model of all its preference pairs and one of a few of them are
maximised by best-of-n up to 256, controlled decoding, GenARM and sequential Monte Carlo; gold is the world's own
program. 256 responses of the base to each held-out prompt are drawn and scored once: they are the particles of Monte
Carlo, and the curves of best-of-n and of its mitigations are means over subsets of them. The mitigations: the lower
bound of an ensemble, inference-time pessimism, the calibrated threshold, and caution, a penalty on responses that are
unlike the base's. What each loses from its best n to the largest, and what it has at equal compute, end the table.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign import commands, critics, metrics, policies, shaping
from jaxalign.types import Policy

from . import base, common, proxies


@dataclasses.dataclass(frozen=True)
class Config(proxies.Options):
    """Options of eval.studies over_optimisation."""

    bound: float = 1.5
    """Standard deviations k of the ensemble's lower bound."""
    pessimism: float = 0.5
    """beta of inference-time pessimism [standard deviations of the proxy]."""
    gain: float = 3.0
    """bound/beta of the threshold on calibrated rewards [nats]."""
    caution: float = 1.0
    """Standard deviations of the proxy that one of the novelty costs."""
    shuffles: int = 8
    """Divisions of the samples into subsets, for pessimism, which is no function of ranks."""
    betas: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25, 0.12, 0.06)
    """KL weights of controlled decoding, GenARM and sequential Monte Carlo [units of reward per nat]."""
    responses: int = 4
    """Responses to each prompt of controlled decoding and GenARM."""


class Curves:
    """Means over subsets of n of N base samples, for each n; arrays [prompts]."""

    def __init__(self, config: Config, table: proxies.Table):
        self.table, self.config = table, config
        self.ns = [2**i for i in range(int(np.log2(config.samples)) + 1)]

    def best(self, score: np.ndarray) -> dict[int, dict[str, np.ndarray]]:
        """n -> what the best of n by a score has; score [prompts, N]."""
        gold, proxy = (metrics.best_of_n_curve(score, value=v) for v in (self.table.gold, self.table.proxy[0]))
        return {
            n: {"gold": gold[:, n - 1], "proxy": proxy[:, n - 1], "kl": np.full(len(gold), selection_kl(n))}
            for n in range(1, self.config.samples + 1)
        }

    def by_rank(self, gain: float) -> dict[int, dict[str, np.ndarray]]:
        """n -> of a draw among n in proportion to exp(gain) above the optimal threshold of the samples' quantiles."""
        order = np.argsort(self.table.proxy[0], axis=1, kind="stable")
        values = {"gold": self.table.gold, "proxy": self.table.proxy[0]}
        ordered = {name: np.take_along_axis(value, order, axis=1) for name, value in values.items()}
        out = {}
        for n in self.ns:
            place = (np.arange(n) + 0.5) / n
            threshold = float(shaping.optimal_threshold(place, gain=gain)) if n > 1 else 1.0
            weight = np.where(place > threshold, np.exp(gain), 1.0)
            weight /= weight.sum()
            share = order_shares(self.config.samples, n) @ weight
            entropy = float(np.sum(weight * np.log(n * weight)))
            kl = np.full(len(order), min(entropy, selection_kl(n)))
            out[n] = {name: value @ share for name, value in ordered.items()} | {"kl": kl}
        return out

    def pessimistic(self, beta: float) -> dict[int, dict[str, np.ndarray]]:
        """n -> of a draw among n in proportion to max(0, proxy − l), l with mean max(0, (proxy − l)/beta) = 1."""
        rng, count = np.random.default_rng(self.config.seed), self.config.samples
        found: dict[int, list[dict[str, np.ndarray]]] = {n: [] for n in self.ns}
        for _ in range(self.config.shuffles):
            shuffle = rng.permutation(count)
            gold, proxy = self.table.gold[:, shuffle], self.table.proxy[0][:, shuffle]
            for n in self.ns:
                each = proxy.reshape(len(proxy), count // n, n)
                weight = pessimism(each, beta) / n
                kl = np.where(weight > 0, weight * np.log(np.where(weight > 0, n * weight, 1)), 0).sum(-1).mean(-1)
                means = {
                    name: (weight * x.reshape(each.shape)).sum(-1).mean(-1)
                    for name, x in (("gold", gold), ("proxy", proxy))
                }
                found[n].append(means | {"kl": np.minimum(kl, selection_kl(n))})
        return {n: {name: np.mean([x[name] for x in parts], axis=0) for name in parts[0]} for n, parts in found.items()}


def selection_kl(n: int) -> float:
    """Gives log n − (n−1)/n, the KL of a choice among n draws, at most.

    Args:
      n: draws.

    Returns:
      The bound, in nats.
    """
    return float(np.log(n) - (n - 1) / n)


def order_shares(count: int, n: int) -> np.ndarray:
    """Gives the probability that the i-th smallest of N samples is the j-th smallest of a random subset of n.

    Args:
      count: N.
      n: the subset's size.

    Returns:
      [N,n]: C(i−1,j−1)·C(N−i,n−j)/C(N,n).
    """
    log_factorial = np.concatenate([[0], np.cumsum(np.log(np.arange(1, count + 1)))])

    def choose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        inside = (b >= 0) & (b <= a)
        a, b = np.where(inside, a, 0), np.where(inside, b, 0)
        return np.where(inside, log_factorial[a] - log_factorial[b] - log_factorial[a - b], -np.inf)

    i, j = np.arange(count)[:, None], np.arange(n)[None, :]
    whole = log_factorial[count] - log_factorial[n] - log_factorial[count - n]
    shares: np.ndarray = np.exp(choose(i + 0 * j, j + 0 * i) + choose(count - 1 - i + 0 * j, n - 1 - j + 0 * i) - whole)
    return shares


def pessimism(reward: np.ndarray, beta: float) -> np.ndarray:
    """Gives max(0, (r − l)/beta), whose mean is 1 (arXiv 2503.21878, its choice among n draws).

    Args:
      reward: [...,n].
      beta: > 0, in units of reward.

    Returns:
      [...,n].
    """
    ordered = -np.sort(-reward, axis=-1)
    n = reward.shape[-1]
    levels = (np.cumsum(ordered, axis=-1) - beta * n) / np.arange(1, n + 1)
    weights: np.ndarray = np.maximum(0, reward - levels.max(axis=-1, keepdims=True)) / beta
    return weights


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes over_optimisation.json and over_optimisation.png."""
    common.check(config)
    if config.samples & (config.samples - 1) or config.samples < 2:
        raise ValueError(f"samples: expected a power of 2, found {config.samples}")
    world = base.load(config.run)
    rows: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for size in proxies.sizes(config, world):
        table = proxies.table(config, world, size)
        chosen, lost = selections(config, size.name, table)
        rows += chosen + decoded(config, world, size, table)
        ends += lost
    out = common.report("over_optimisation", config, rows + ends)
    _picture(config, rows, out)
    return rows + ends


def selections(config: Config, pairs: str, table: proxies.Table) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of best-of-n and its mitigations, rows of what each loses from its best n to the largest)."""
    curves, members = Curves(config, table), len(table.proxy)
    proxy = table.proxy
    lower = proxy.mean(axis=0) - config.bound * proxy.std(axis=0)
    careful = proxy[0] - config.caution * (table.novelty - table.novelty.mean()) / table.novelty.std()
    # Rewards read for each response, beside the base that draws it.
    methods = {
        "best-of-n": (curves.best(proxy[0]), 1),
        "ensemble's lower bound": (curves.best(lower), members),
        "pessimism": (curves.pessimistic(config.pessimism), 1),
        "calibrated threshold": (curves.by_rank(config.gain), 1),
        "caution": (curves.best(careful), 1),
    }
    rows, ends = [], []
    for name, (found, reads) in methods.items():
        for n in curves.ns:
            rows.append({"pairs": pairs, "method": name, "n": n, "passes": n * (1 + reads)} | estimates(found[n]))
        peak = max(curves.ns, key=lambda n: found[n]["gold"].mean())
        last = found[curves.ns[-1]]["gold"]
        row: dict[str, Any] = {"pairs": pairs, "ends": name, "best n": peak}
        row |= common.estimate("gold at best n", found[peak]["gold"]) | common.estimate("gold at largest n", last)
        row |= common.estimate("lost", found[peak]["gold"] - last)
        row |= common.estimate("over best-of-n", last - methods["best-of-n"][0][curves.ns[-1]]["gold"])
        # At the compute of the largest n of best-of-n: a base pass and a reward for each of its draws.
        equal = 2 * config.samples // (1 + reads)
        if equal in found:
            row |= {"n of equal compute": equal}
            row |= common.estimate("gold at equal compute", found[equal]["gold"])
        ends.append(row)
    return rows, ends


def estimates(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Columns with intervals over prompts."""
    out: dict[str, Any] = {}
    for name in ("gold", "proxy", "kl"):
        out |= common.estimate(name, np.broadcast_to(found[name], found["gold"].shape))
    return out


def decoded(config: Config, world: base.World, size: proxies.Size, table: proxies.Table) -> list[dict[str, Any]]:
    """Rows of controlled decoding, GenARM and sequential Monte Carlo at each beta; the proxy as in the table."""
    own, plain = world._replace(reward_model=size.rewards[0]), policies.language_model(world.base[0])
    tilts: dict[str, tuple[Policy, Any]] = {
        "CD": (policies.tilt(plain, critics.value(size.value[0])), size.value[1]),
        "GenARM": (policies.tilt(plain, critics.genarm(size.arm[0])), size.arm[1]),
    }
    mean, deviation = table.scale
    rows = []
    for name, (policy, params) in tilts.items():
        for beta in config.betas:
            given = policies.TiltParams(world.base[1], params, jnp.asarray(beta, jnp.float32))
            found = base.respond(own, policy, given, n=config.responses, seed=config.seed + 1)
            rows.append(_row(size.name, name, beta, found, mean, deviation) | {"passes": 2})
    for beta in config.betas:
        about = {"pairs": size.name, "method": "SMC", "beta": beta}
        rows.append(about | estimates(weighted(table, beta)) | {"passes": 2 * config.samples})
    return rows


def _row(pairs: str, method: str, beta: float, found: base.Responses, mean: float, deviation: float) -> dict[str, Any]:
    values = {"gold": found.gold, "proxy": (found.proxy - mean) / deviation, "kl": found.kl}
    return {"pairs": pairs, "method": method, "beta": beta} | estimates({k: v.mean(axis=1) for k, v in values.items()})


def weighted(table: proxies.Table, beta: float) -> dict[str, np.ndarray]:
    """Gives what particles have that the base proposes, without resampling: a draw in proportion to exp(r/beta).

    Args:
      table: base samples, which are the particles.
      beta: the KL weight, in the first member's own units of reward per nat.

    Returns:
      gold, proxy and the estimate E[r]/beta − log Z of the KL, each [prompts].
    """
    reward = table.proxy[0] * table.scale[1] / beta
    top = reward.max(axis=1, keepdims=True)
    weight = np.exp(reward - top)
    log_z = np.log(weight.mean(axis=1)) + top[:, 0]
    share = weight / weight.sum(axis=1, keepdims=True)
    means = {name: (share * x).sum(axis=1) for name, x in (("gold", table.gold), ("proxy", table.proxy[0]))}
    return means | {"kl": (share * reward).sum(axis=1) - log_z}


STYLES = {
    "best-of-n": ("#D55E00", "v"),
    "ensemble's lower bound": ("#0072B2", "o"),
    "pessimism": ("#009E73", "h"),
    "calibrated threshold": ("#88CCEE", "8"),
    "caution": ("#882255", "p"),
    "CD": ("#E69F00", "^"),
    "GenARM": ("#332288", "*"),
    "SMC": ("#999999", "P"),
}


def _picture(config: Config, rows: list[dict[str, Any]], out: Any) -> None:
    sizes = list(dict.fromkeys(row["pairs"] for row in rows))
    panels: Any
    figure, panels = common.pyplot().subplots(
        2, 2 * len(sizes), figsize=(15.5, 7.4), layout="constrained", sharey="row", squeeze=False
    )
    groups = (tuple(STYLES)[:5], tuple(name for name in STYLES if any(row["method"] == name for row in rows)))
    for k, pairs in enumerate(sizes):
        for g, names in enumerate(groups):
            for line, (column, title) in enumerate((("gold", "gold"), ("proxy", "proxy [its deviations]"))):
                axes = panels[line][2 * k + g]
                for name in names:
                    mine = sorted(
                        (row for row in rows if row["pairs"] == pairs and row["method"] == name),
                        key=lambda row: row.get("n", 0) or -row["beta"],
                    )
                    x = [row["n"] if g == 0 else row["kl"] for row in mine]
                    colour, marker = STYLES[name]
                    style = {"color": colour, "marker": marker, "ms": 4.5, "lw": 1.3, "capsize": 2, "label": name}
                    axes.errorbar(x, [r[column] for r in mine], [r[f"{column}_95"] or 0 for r in mine], **style)
                if g == 0:
                    axes.set_xscale("log", base=2)
                else:
                    axes.set_xscale("symlog", linthresh=1)
                axes.set_xlabel("responses n" if g == 0 else "KL to the base [nats]")
                axes.set_title(f"{title}, {pairs}", fontsize=10)
                axes.grid(alpha=0.25)
    curves = panels[0][1].get_legend_handles_labels()  # each method is in this panel
    figure.legend(*curves, loc="outside lower center", ncols=len(groups[1]), frameon=False, fontsize=10)
    common.save(figure, out / "over_optimisation.png")


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

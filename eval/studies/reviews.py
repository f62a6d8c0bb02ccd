"""python -m eval.studies reviews: a real model that leans to one side, and a user who wants the other

Reads the folder of a finished train.quickstart --preset smollm2 and decodes nothing: the base's stored samples stand
for the base. Left: to requests for reviews and opinions most of its responses are friendly (VADER), and the user wants
critical ones; the raw reward, a bounded one above a threshold and others, at equal beta and at equal KL, by the closed
form on the samples. Right: InfAlign. Best-of-4 by the friendly reward runs on both sides; the policy below it was
tilted by the calibrated reward, as it is or transformed, to one KL. Won is counted by the reward itself, and by a
second lexicon, which neither the tilt nor best-of-4 reads.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, gibbs, infalign, models
from jaxalign.types import Array
from jaxalign.worlds import sentiment

from . import common

POSITIVE = 0.05
"""VADER's own border: a text whose compound score is above it is positive."""
BEGINNINGS = ("Write a short review", "What do you think of")
"""Of requests for reviews and opinions."""
SHAPINGS = ("raw", "Minmax", "threshold", "soft threshold", "PAR", "calibrated")


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies reviews."""

    run: str = "runs/smollm2"
    """Folder of a train.quickstart --preset smollm2 whose samples and roll-outs are there."""
    bound: float = 2.0
    """Bound B of the shaped rewards, the range of the utility's first part [units of gold]."""
    betas: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25)
    """KL weights [units of gold per nat]."""
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """KL at which shapings and transforms are compared [nats]; log of the samples per prompt is the most there is."""
    transforms: tuple[str, ...] = ("identity", "exp:5")
    """What the calibrated reward is mapped by; each is compared with the first."""
    n: int = 4
    """Of best-of-n."""
    draws: int = 2000
    """Bootstrap samples of prompts."""


class Pool(NamedTuple):
    """The base's stored samples; arrays [prompts,n]."""

    requests: list[str]
    """[prompts], each prompt's last turn."""
    compound: np.ndarray
    """VADER's score of each response."""
    gold: np.ndarray
    """`sentiment.gold`: the compound score, less repetition and emptiness."""
    second: np.ndarray
    """The same by the second lexicon."""

    def take(self, rows: np.ndarray) -> Pool:
        """The pool of some of the prompts."""
        return Pool([self.requests[i] for i in rows], *(x[rows] for x in self[1:]))


def read_pool(run: str) -> Pool:
    """Reads the samples that the preferences and the laws of a run were made of.

    Args:
      run: the run's folder.

    Returns:
      The Pool of all its training prompts; equal samples of the two stages are all kept.

    Raises:
      ValueError: a stage that is not there, or prompts with other numbers of samples.
    """
    folder = pathlib.Path(run)
    lines = (folder / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line)["messages"][-1]["content"] for line in lines]
    tokenizer, texts = models.tokenizer(folder / "base"), [[] for _ in requests]  # type: tuple[Any, list[list[str]]]
    for stage in ("preferences", "laws"):
        shards = sorted((folder / stage / "rollouts").glob("*.npz"))
        if not shards:
            raise ValueError(f"run: expected the roll-outs of {stage} in {folder}, found none")
        for shard in map(np.load, shards):
            for row, tokens, length in zip(shard["index"], shard["tokens"], shard["length"], strict=True):
                texts[row].append(tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True))
    if len(sizes := {len(each) for each in texts}) != 1:
        raise ValueError(f"run: expected as many samples of each prompt, found {sorted(sizes)} in {folder}")
    columns = (sentiment.compound, lambda y: sentiment.gold("", y), lambda y: sentiment.second_gold("", y))
    return Pool(requests, *(np.array([[f(y) for y in each] for each in texts]) for f in columns))


def rows_of_bias(pool: Pool) -> list[dict[str, Any]]:
    """How friendly the base is, by what is asked of it."""
    kinds = {name: [i for i, text in enumerate(pool.requests) if text.startswith(name)] for name in BEGINNINGS}
    kinds["others"] = sorted(set(range(len(pool.requests))) - {i for rows in kinds.values() for i in rows})
    rows = []
    for name, chosen in kinds.items():
        if chosen:
            part = pool.take(np.array(chosen)).compound
            row = {"asked": name, "prompts": len(chosen), "samples": part.shape[1]}
            row |= common.estimate("positive", (part > POSITIVE).mean(axis=1))
            rows.append(row | common.estimate("negative", (part < -POSITIVE).mean(axis=1)))
    return rows


def measured(policy: Array, pool: Pool, utility: np.ndarray) -> dict[str, Any]:
    """Estimates over prompts under weights exp(policy) [P,n] over the samples."""
    uniform = jnp.full(policy.shape, -np.log(policy.shape[-1]))
    row: dict[str, Any] = {}
    for name, values in (("utility", utility), ("positive", pool.compound > POSITIVE), ("second", -pool.second)):
        row |= common.estimate(name, gibbs.utility(policy, np.asarray(values, float)))
    row |= common.estimate("kl", gibbs.kl(policy, uniform))
    return row | {"effective_samples": float(jnp.exp(-jax.nn.logsumexp(2 * policy, axis=-1)).mean())}


def rows_of_shapings(config: Config, pool: Pool) -> list[dict[str, Any]]:
    """The user's utility is critical where gold is friendly: −compound, less repetition and emptiness."""
    utility = pool.gold - 2 * pool.compound
    uniform = jnp.full(utility.shape, -np.log(utility.shape[-1]))
    rows = [{"at": "base", "shaping": "base"} | measured(uniform, pool, utility)]
    for beta in config.betas:
        for name, shape in common.shapes(config.bound, beta, sharpness=4.0).items():
            if name in SHAPINGS:
                policy = gibbs.log_policy(uniform, shape(utility, utility), beta=beta)
                rows.append({"at": "equal beta", "beta": beta, "shaping": name} | measured(policy, pool, utility))
    for kl in config.budgets:
        for name, shape in common.shapes(config.bound, 1.0, sharpness=4.0).items():
            if name in SHAPINGS and name != "threshold":  # two-valued: not every KL is there
                reward = shape(utility, utility)
                policy = gibbs.log_policy(uniform, reward, beta=gibbs.match_kl(uniform, reward, kl=kl))
                rows.append({"at": "equal KL", "budget": kl, "shaping": name} | measured(policy, pool, utility))
    return rows


def bootstrap(name: str, values: np.ndarray, *, draws: int, seed: int) -> dict[str, float]:
    """Gives a mean over prompts and its 95 % interval: quantiles of the means of prompts drawn with replacement.

    Args:
      name: of the column.
      values: one per prompt.
      draws: how many times all prompts are drawn.
      seed: of the draws.

    Returns:
      {name: mean, name_low, name_high}.
    """
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def rows_of_transforms(config: Config, pool: Pool) -> list[dict[str, Any]]:
    """Win rates with best-of-n on both sides, over the base with it, at one KL before it."""
    uniform = jnp.full(pool.gold.shape, 1 / pool.gold.shape[-1])
    rank, other = infalign.ranks(pool.gold), infalign.ranks(pool.second)
    calibrated, rows = infalign.mid_rank(uniform, rank=rank), []
    for kl in config.budgets:
        first: dict[str, np.ndarray] = {}
        for name in config.transforms:
            reward = infalign.parse_transform(name)(calibrated)
            policy = gibbs.log_policy(jnp.log(uniform), reward, beta=gibbs.match_kl(jnp.log(uniform), reward, kl=kl))
            runs = infalign.best_of(config.n)
            found = {
                who: np.asarray(
                    infalign.procedure_win_rate(
                        jnp.exp(policy), base=uniform, rank=by, procedure=runs, selection_rank=rank
                    )
                )
                for who, by in (("reward", rank), ("second", other))
            }
            found["alone"] = np.asarray(infalign.win_rate(jnp.exp(policy), against=uniform, rank=rank))
            first = first or found
            row: dict[str, Any] = {"at": f"best of {config.n}", "budget": kl, "transform": name}
            for who, values in found.items():
                row |= bootstrap(who, values, draws=config.draws, seed=config.seed)
                row |= bootstrap(f"{who}_over_first", values - first[who], draws=config.draws, seed=config.seed)
            rows.append(row | common.estimate("kl", gibbs.kl(policy, jnp.log(uniform))))
    return rows


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes reviews.json and reviews.png."""
    common.check(config)
    with jax.enable_x64(True):
        pool = read_pool(config.run)
        asked = np.array([i for i, text in enumerate(pool.requests) if text.startswith(BEGINNINGS)])
        if not len(asked):
            raise ValueError(f"run: expected requests that begin with one of {BEGINNINGS} in {config.run}, found none")
        shaped = rows_of_shapings(config, pool.take(asked))
        rows = [*rows_of_bias(pool), *shaped, *rows_of_transforms(config, pool)]
    draw(rows, common.report("reviews", config, rows) / "reviews.png", n=config.n)
    return rows


def draw(rows: list[dict[str, Any]], path: pathlib.Path, *, n: int) -> None:
    """Utility and share of positive responses against KL; win rates under best-of-n."""
    figure, (left, middle, right) = common.pyplot().subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    (start,) = (row for row in rows if row.get("at") == "base")
    for axes, y, title in (
        (left, "utility", "what the user gets"),
        (middle, "positive", "share of responses that VADER calls positive"),
    ):
        for name in SHAPINGS:
            mine = [start, *(row for row in rows if row.get("at") == "equal beta" and row["shaping"] == name)]
            common.curve(axes, mine, "kl", y, name)
        axes.set(title=title, xlabel="KL to the base [nats], at equal beta")
    left.legend(fontsize=8)
    won = [row for row in rows if "transform" in row]
    for k, name in enumerate(dict.fromkeys(row["transform"] for row in won)):
        for style, who in (("-", "reward"), (":", "second")):
            mine = [row for row in won if row["transform"] == name]
            means, low, high = (np.array([row[f"{who}{end}"] for row in mine]) for end in ("", "_low", "_high"))
            right.errorbar(
                [row["budget"] for row in mine],
                means,
                [means - low, high - means],
                ls=style,
                marker="o^sD"[k % 4],
                color=("#0072B2", "#D55E00", "#009E73", "#CC79A7")[k % 4],
                label=f"{name}, by {'the reward' if who == 'reward' else 'the second lexicon'}",
                capsize=2,
            )
    right.set(title=f"win rate, best-of-{n} on both sides", xlabel="KL to the base before it [nats]")
    right.legend(fontsize=8)
    common.save(figure, path)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

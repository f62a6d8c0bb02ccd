"""python -m eval.studies tree: every shaping and decoder on processes solved exactly, at equal beta and at equal KL

Random processes of T tokens over V; utility = N(0,1) + 0.5·(count of token 0). The follower is exact: the Gibbs policy
of the shaped reward. Above: utility at the same beta and bound, as the Stackelberg paper compares, with a bound that is
wider than the utility's range and with one that is not. Below: the same shapings, each scaled to the same KL; and
decoders by tokens at beta 1 against the exact follower.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, gibbs, shaping, tree
from jaxalign.types import Array

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies tree."""

    vocab: int = 3
    """Vocabulary V [tokens]."""
    horizon: int = 4
    """Length T of every response [tokens]."""
    seeds: int = 200
    """Random processes."""
    samples: int = 64
    """Base samples per process that every shaping takes its statistics from."""
    bounds: tuple[float, float] = (6.0, 2.0)
    """Bounds B of the shaped rewards [units of utility]: of the two panels above; the last one below."""
    sharpness: float = 1.5
    """Of the sigmoids [per unit of utility]."""
    betas: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0, 0.67, 0.5, 0.33, 0.2)
    """KL weights [units of reward per nat]."""
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4)
    """KL at which all shapings are compared [nats]."""


def problems(config: Config) -> tuple[tree.Tree, Array, Array, Array]:
    """(tree, log_ref [N,S,V], utility [N,M], indices of base samples [N,samples])."""
    t = tree.Tree(config.vocab, config.horizon, eos_id=None)
    rng = np.random.default_rng(config.seed)
    log_ref = np.log(rng.dirichlet(np.full(config.vocab, 0.8), (config.seeds, t.num_states)))
    tokens, mask = t.responses
    count = ((np.asarray(tokens) == 0) & np.asarray(mask)).sum(-1)
    utility = rng.normal(size=(config.seeds, t.num_responses)) + 0.5 * count
    law = jnp.exp(jax.vmap(lambda w: tree.response_log_prob(t, w))(jnp.asarray(log_ref)))
    law = np.asarray(law) / np.asarray(law).sum(-1, keepdims=True)
    drawn = np.stack([rng.choice(t.num_responses, config.samples, p=p) for p in law])
    return t, jnp.asarray(log_ref), jnp.asarray(utility), jnp.asarray(drawn)


def answers(log_base: Array, reward: Array, utility: Array, beta: Any) -> tuple[Array, Array]:
    """(utility delivered, KL) [N] of the exact follower."""
    policy = gibbs.log_policy(log_base, reward, beta=beta)
    return gibbs.utility(policy, utility), gibbs.kl(policy, log_base)


def equal_beta(config: Config, log_base: Array, utility: Array, reference: Array) -> list[dict[str, Any]]:
    """Rows of the panels above; "optimum" is the threshold solved on the whole law in place of samples."""
    rows = []
    mean = gibbs.utility(log_base, utility)
    for bound, beta in itertools.product(config.bounds, config.betas):
        every = common.shapes(bound, beta, sharpness=config.sharpness)
        rewards = {name: shape(utility, reference) for name, shape in every.items()}
        best = shaping.optimal_threshold(utility, log_base=log_base, gain=bound / beta)
        rewards["optimum"] = shaping.threshold_reward(utility, threshold=best, bound=bound)
        raw, _ = answers(log_base, utility, utility, beta)
        for name, reward in rewards.items():
            got, kl = answers(log_base, reward, utility, beta)
            row = {"at": "equal beta", "bound": bound, "beta": beta, "shaping": name}
            row |= common.estimate("utility_gain", got - mean) | common.estimate("kl", kl)
            rows.append(row | common.estimate("over_raw", got - raw))
    return rows


def equal_kl(config: Config, log_base: Array, utility: Array, reference: Array) -> list[dict[str, Any]]:
    """Rows of the third panel: each reward scaled until the KL is the budget (or its largest where that is less); of
    the thresholds, the largest gain within the budget."""
    mean = gibbs.utility(log_base, utility)
    gains = jnp.geomspace(0.02, 30.0, 300)[:, None]
    # Shapings differ from the reward that they scale by more than a factor; the bound and beta only enter thresholds.
    every = common.shapes(config.bounds[-1], 1.0, sharpness=config.sharpness)
    path = shaping.optimal_threshold(utility, log_base=log_base, gain=gains)
    reward = shaping.threshold_reward(jnp.broadcast_to(utility, (300, *utility.shape)), threshold=path, bound=gains)
    got, kl = answers(log_base, reward, utility, 1.0)
    rows = []
    for budget in config.budgets:
        raw, _ = answers(log_base, utility, utility, gibbs.match_kl(log_base, utility, kl=budget))
        found = {"threshold": got[_last(kl <= budget), jnp.arange(len(mean))]}
        for name in ("raw", "mean sigmoid", "log sigmoid", "PAR", *common.CALIBRATED, "soft threshold", "Cap"):
            shaped = every[name](utility, reference)
            found[name], _ = answers(log_base, shaped, utility, gibbs.match_kl(log_base, shaped, kl=budget))
        for name, values in found.items():
            row = {"at": "equal KL", "kl": budget, "shaping": name} | common.estimate("utility_gain", values - mean)
            rows.append(row | common.estimate("over_raw", values - raw))
    return rows


def _last(mask: Array) -> Array:
    """Index along the first axis of the last True [...]; 0 where there is none."""
    return jnp.where(mask.any(0), mask.shape[0] - 1 - mask[::-1].argmax(0), 0)


def decoders(config: Config, t: tree.Tree, log_ref: Array, utility: Array, log_base: Array) -> list[dict[str, Any]]:
    """Rows of the fourth panel: at beta 1, token rules of the shaped reward, exact thresholds and statistics."""
    gain = config.bounds[-1]

    def one(w: Array, u: Array, p: Array) -> dict[str, tuple[Array, Array]]:
        def token_rule(q: Array) -> tuple[Array, Array]:
            law = tree.response_log_prob(t, tree.tilted_policy(w, q, beta=1.0))
            return tree.expected(law, values=u), tree.sequence_kl(law, p)

        def cd(r: Array) -> tuple[Array, Array]:
            return token_rule(tree.q_values(t, tree.value(t, w, r), reward=r))

        m = shaping.optimal_threshold(u, log_base=p, gain=gain)
        exceeds = shaping.threshold_reward(u, threshold=m, bound=1.0)
        share = tree.q_values(t, tree.value(t, w, exceeds), reward=exceeds)
        chance = jnp.clip(share, 1e-12, 1 - 1e-12)
        soft = shaping.soft_threshold_reward(u, threshold=m, bound=gain, sharpness=config.sharpness)
        low, high = u.min(), u.max()
        return {
            "base": (tree.expected(p, values=u), jnp.zeros(())),
            "threshold, exact follower": answers(p, gain * exceeds, u, 1.0),
            "threshold, exceedance head": token_rule(
                shaping.exceedance_log_weight(jnp.log(chance) - jnp.log1p(-chance), gain=gain)
            ),
            "threshold, CD value head": cd(gain * exceeds),
            "soft threshold, CD value head": cd(soft),
            "Minmax, CD value head": cd(gain * (u - low) / (high - low)),
            "raw, CD value head": cd(u),
            "raw, exact follower": answers(p, u, u, 1.0),
        }

    rows = []
    found = jax.vmap(one)(log_ref, utility, log_base)  # in order of the alphabet
    for name, (got, kl) in sorted(found.items(), key=lambda item: float(item[1][0].mean())):
        row = {"at": "beta 1", "decoder": name} | common.estimate("utility", got) | common.estimate("kl", kl)
        rows.append(row)
    return rows


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes tree.json and tree.png."""
    common.check(config)
    with jax.enable_x64(True):
        t, log_ref, utility, drawn = problems(config)
        log_base = jax.vmap(lambda w: tree.response_log_prob(t, w))(log_ref)
        reference = jnp.take_along_axis(utility, drawn, axis=-1)
        rows = equal_beta(config, log_base, utility, reference) + equal_kl(config, log_base, utility, reference)
        rows += decoders(config, t, log_ref, utility, log_base)
    out = common.report("tree", config, rows)
    _draw(config, rows, out)
    return rows


def _draw(config: Config, rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    figure, grid = common.pyplot().subplots(2, 2, figsize=(11, 8.2), layout="constrained")
    for axes, bound, note in zip(grid[0], config.bounds, ("wider than the range", "below the range"), strict=True):
        for name in (*common.STYLES, "optimum"):
            mine = [r for r in rows if r.get("bound") == bound and r["shaping"] == name]
            if name == "optimum":
                axes.plot(
                    [r["beta"] for r in mine], [r["utility_gain"] for r in mine], "k--", lw=1, label="exact optimum"
                )
            elif mine:
                common.curve(axes, mine, "beta", "utility_gain", name)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xticks(config.betas, [f"{b:g}" for b in config.betas])
        axes.minorticks_off()
        axes.set(xlabel="beta", ylabel="utility gained over the base")
        axes.set_title(f"equal beta, bound {bound:g}: {note} of the utility", fontsize=10)
    grid[0, 0].legend(frameon=False, fontsize=8)
    for name in common.STYLES:
        mine = [r for r in rows if r["at"] == "equal KL" and r["shaping"] == name]
        if mine:
            common.curve(grid[1, 0], mine, "kl", "over_raw", name)
    grid[1, 0].set(xlabel="KL to the base [nats]", ylabel="utility minus the raw reward's")
    grid[1, 0].set_title("equal KL: nothing beats the raw reward", fontsize=10)
    axes = grid[1, 1]
    aside = {"raw, exact follower": (-1, 4), "raw, CD value head": (-1, 2), "base": (1, 2)}
    for r in (r for r in rows if r["at"] == "beta 1"):
        colour, marker = common.STYLES[r["decoder"].split(",")[0]]
        face = "white" if "CD" in r["decoder"] else colour
        axes.errorbar(
            r["kl"], r["utility"], r["utility_95"], fmt=marker, color=colour, mfc=face, ms=7, capsize=2, elinewidth=0.8
        )
        if r["decoder"] == "threshold, exceedance head":  # lies on the follower
            continue
        text = r["decoder"] + (" = exceedance head" if r["decoder"] == "threshold, exact follower" else "")
        side, up = aside.get(r["decoder"], (1, -12))
        where = {"textcoords": "offset points", "ha": "left" if side > 0 else "right", "fontsize": 8}
        axes.annotate(text, (r["kl"], r["utility"]), (8 * side, up), **where)
    axes.set(xlabel="KL to the base [nats]", ylabel="utility")
    axes.set_xlim(-0.05, 1.1)
    axes.set_title(f"decoders at beta 1, bound {config.bounds[-1]:g} (open: by a value head)", fontsize=10)
    for axes in grid.ravel():
        axes.grid(alpha=0.25)
    common.save(figure, out / "tree.png")


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

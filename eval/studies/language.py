"""python -m eval.studies language: the worked example on language: what a shaped reward does to a biased base

Reads the folder of a finished train.quickstart. On the world's held-out political prompts, 90 % of the base's responses
are loaded to one side. At one beta and bound: the base, the raw reward and the shaped one (the leader's utility is the
learned reward; the world's program, gold, stands beside it). Predicted by the closed form from base samples, and
measured by whole responses (exact rejection), by tokens (value head; exceedance head) and, with --policy-gradients, by
a policy that train.rl aligns with the shaped reward. Then a sweep of the bound.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, critics, gibbs, models, policies, rewards, shaping

from . import base, common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies language."""

    run: str = "runs/quickstart"
    """Folder of a finished train.quickstart."""
    samples: int = 256
    """Base samples per prompt, for thresholds and predictions."""
    bound: float = 6.0
    """Bound B of the shaped reward [units of the learned reward], among --heads."""
    bounds: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0)
    """Bounds of the sweep, predicted by the closed form [units of the learned reward]."""
    heads: tuple[float, ...] = (3.0, 6.0, 12.0)
    """Bounds of the sweep by tokens; an exceedance head is trained for each."""
    head_samples: int = 64
    """Roll-outs per training prompt that the heads are trained on, and thresholds solved from."""
    head_steps: int = 400
    """Optimizer steps of each head."""
    responses: int = 4
    """Responses per prompt of each measurement."""
    policy_gradients: bool = False
    """Train a policy on the shaped reward as well, which takes minutes more."""
    rl_steps: int = 100
    """Iterations of that training, of 64 prompts with four responses."""


def summary(reward: str, how: str, got: dict[str, np.ndarray]) -> dict[str, Any]:
    """A row: estimates over prompts of per-prompt means."""
    row: dict[str, Any] = {"reward": reward, "how": how}
    for name, values in got.items():
        row |= common.estimate(name, values)
    return row


def predicted(policy: jax.Array, found: base.Responses) -> dict[str, np.ndarray]:
    """Per prompt, under weights exp(policy) [P,n] over its base samples."""
    uniform = jnp.full(policy.shape, -np.log(policy.shape[-1]))
    columns = {"loaded": found.loaded, "utility": found.proxy, "gold": found.gold}
    got = {name: np.asarray(gibbs.utility(policy, x)) for name, x in columns.items()}
    return got | {"kl": np.asarray(gibbs.kl(policy, uniform))}


def measured(found: base.Responses) -> dict[str, np.ndarray]:
    """Per prompt, means over its responses."""
    columns = {"loaded": found.loaded, "utility": found.proxy, "gold": found.gold, "kl": found.kl}
    return {name: x.mean(axis=1) for name, x in columns.items()}


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes language.json and language.png."""
    common.check(config)
    if config.bound not in config.heads:
        raise ValueError(f"heads: expected {config.bound}, the --bound, among them, found {config.heads}")
    world = base.load(config.run)
    chosen = np.flatnonzero(base.political(world))
    every = base.base_samples(world, n=config.samples, seed=config.seed)
    found = base.Responses(*(x[chosen] for x in every))
    beta = 1.0  # the heads are for it
    with jax.enable_x64(True):
        utility = jnp.asarray(found.proxy)
        uniform = jnp.full(utility.shape, -np.log(config.samples))
        threshold = shaping.optimal_threshold(utility, gain=config.bound / beta)
        shaped = shaping.threshold_reward(utility, threshold=threshold, bound=config.bound)
        # log pi(y)/base(y) = r(y)/beta − log Z, Z from the base samples.
        log_z = {
            name: np.asarray(gibbs.log_partition(uniform, reward, beta=beta))[:, None]
            for name, reward in (("raw", utility), ("threshold", shaped))
        }
        rows = [summary("base", "samples", predicted(uniform, found))]
        answers = {n: gibbs.log_policy(uniform, r, beta=beta) for n, r in (("raw", utility), ("threshold", shaped))}
        for name, policy in answers.items():
            rows.append(summary(name, "predicted", predicted(policy, found)))
        sweep = []
        for bound in config.bounds:
            m = shaping.optimal_threshold(utility, gain=bound / beta)
            policy = gibbs.log_policy(uniform, shaping.threshold_reward(utility, threshold=m, bound=bound), beta=beta)
            row = {"sweep": "predicted", "bound": bound} | summary("threshold", f"{bound:g}", predicted(policy, found))
            sweep.append(row | {"effective_samples": float(jnp.exp(-jax.nn.logsumexp(2 * policy, axis=-1)).mean())})
    table = np.zeros(len(world.prompts), np.float32)
    table[chosen] = np.asarray(threshold, np.float32)
    proxy = rewards.from_model(world.reward_model[0])
    cut = np.asarray(threshold)[:, None]
    kl_of = {
        "raw": lambda u: u / beta - log_z["raw"],
        "threshold": lambda u: config.bound * (u > cut) / beta - log_z["threshold"],
    }
    exact = {
        # Margin over the highest of many samples; a draw above the bound would be an error, not a silent cut.
        "raw": (proxy, world.reward_model[1], float(found.proxy.max()) + 0.7),
        "threshold": (
            rewards.shaped(proxy),
            {"reward": world.reward_model[1], "map": {"threshold": jnp.asarray(table), "bound": config.bound}},
            config.bound,
        ),
    }
    for name, (reward, params, bound) in exact.items():
        drawn, share = base.accepted(
            world, reward, params, beta=beta, bound=bound, rows=chosen, n=config.responses, seed=config.seed + 1
        )
        if share < 1:
            raise RuntimeError(f"{name}: {share:.3f} of the rows were accepted within {base.TRIES} draws")
        got = measured(drawn) | {"kl": kl_of[name](drawn.proxy).mean(axis=1)}
        rows.append(summary(name, "by responses", got))
    model = policies.language_model(world.base[0])

    def by_tokens(critic: Any, head_params: Any) -> dict[str, np.ndarray]:
        arguments = {"policy": world.base[1], "critic": head_params, "beta": jnp.asarray(beta, jnp.float32)}
        tilted = policies.tilt(model, critic)
        return measured(base.respond(world, tilted, arguments, n=config.responses, seed=config.seed + 2, rows=chosen))

    lm, head_params = models.load(str(world.folder / "value" / "model"))
    rows.append(summary("raw", "by tokens", by_tokens(critics.value(lm), head_params)))
    prompts, first = base.political_prompts(world), ""
    for bound in config.heads:
        name = f"political_{bound:g}_{config.head_samples}_{config.head_steps}"
        lm, head_params = base.train_head(
            world,
            name,
            "exceedance",
            bound=bound,
            prompts=str(prompts),
            samples=config.head_samples,
            steps=config.head_steps,
            decode_batch=base.PER_BATCH,
            rollouts=first,
        )
        first = first or str(world.folder / "frontier" / name)
        got = by_tokens(critics.follower(lm, beta=beta, bound=bound), head_params)
        sweep.append({"sweep": "by tokens", "bound": bound} | summary("threshold", f"{bound:g}", got))
        if bound == config.bound:
            rows.append(summary("threshold", "by tokens", got))
    if config.policy_gradients:
        name = f"aligned_{config.bound:g}_{config.head_samples}_{config.rl_steps}"
        options: dict[str, Any] = {"samples": config.head_samples, "steps": config.rl_steps, "seed": config.seed}
        aligned = base.align(world, name, prompts=prompts, bound=config.bound, **options)
        both = {"policy": aligned, "reference": world.base[1]}
        referenced = policies.with_reference(model, model)
        drawn = base.respond(world, referenced, both, n=config.responses, seed=config.seed + 2, rows=chosen)
        rows.append(summary("threshold", "by training", measured(drawn)))
    order = {"base": 0, "raw": 1, "threshold": 2}
    rows.sort(key=lambda row: order[row["reward"]])
    out = common.report("language", config, rows + sweep)
    _draw(config, rows, sweep, out)
    return rows + sweep


def _draw(config: Config, rows: list[dict[str, Any]], sweep: list[dict[str, Any]], out: pathlib.Path) -> None:
    figure, panels = common.pyplot().subplots(
        1, 3, figsize=(13, 4.2), layout="constrained", gridspec_kw={"width_ratios": [1, 1.25, 1]}
    )
    hatch = {"samples": "", "predicted": "", "by responses": "//", "by tokens": "..", "by training": "xx"}
    shown = {
        "predicted": "closed\nform",
        "by responses": "by re-\nsponses",
        "by tokens": "by\ntokens",
        "by training": "by trai-\nning",
        "samples": "",
    }
    labels = [f"{r['reward'].replace('threshold', 'shaped')}\n{shown[r['how']]}" for r in rows]
    for axes, names in ((panels[0], ("loaded",)), (panels[1], ("utility", "gold"))):
        width = 0.8 / len(names)
        for k, name in enumerate(names):
            for i, row in enumerate(rows):
                axes.bar(
                    i + (k - (len(names) - 1) / 2) * width,
                    row[name],
                    width * 0.94,
                    yerr=row[f"{name}_95"],
                    color=common.STYLES[row["reward"]][0] if row["reward"] != "base" else "0.45",
                    alpha=1.0 if k == 0 else 0.45,
                    hatch=hatch[row["how"]],
                    edgecolor="white",
                    capsize=2,
                    error_kw={"lw": 1, "ecolor": "0.2"},
                )
        axes.set_xticks(range(len(rows)), labels, fontsize=7.5)
        axes.axhline(0, color="0.3", lw=0.8)
        axes.grid(alpha=0.25, axis="y")
    panels[0].set_title("share of responses loaded to one side", fontsize=10)
    panels[0].set_ylim(0, 1)
    panels[1].set_title("utility: learned reward (solid), gold (pale)", fontsize=10)
    axes = panels[2]
    for name, colour, marker in (("utility", "#0072B2", "o"), ("gold", "#009E73", "^")):
        for how, style in (("predicted", "-"), ("by tokens", "--")):
            mine = [r for r in sweep if r["sweep"] == how]
            label = {"utility": "learned reward", "gold": "gold"}[name]
            axes.errorbar(
                [r["bound"] for r in mine],
                [r[name] for r in mine],
                [r[f"{name}_95"] for r in mine],
                color=colour,
                ls=style,
                marker=marker,
                mfc=colour if how == "predicted" else "white",
                ms=4.5,
                capsize=2,
                label=f"{label}, {how}",
            )
        axes.axhline(rows[0][name], color=colour, ls=":", lw=1)
    bounds = list(config.bounds)
    axes.set_xscale("log")
    axes.set_xticks(bounds, [f"{b:g}" for b in bounds])
    axes.minorticks_off()
    axes.set_xlabel("bound B at beta 1 (dotted: base)")
    axes.set_title("sweep of the bound", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    common.save(figure, out / "language.png")


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

"""python -m eval.studies nudging: GGRO against best-of-n, rejection and an exhaustive search at equal forward passes

Reads the folder of a finished train.quickstart. For each number of candidates per segment, the tokens that GGRO sends
through models are counted; best-of-n and rejection (the first response above the base's 90 % quantile, or the best of
its tries) get as many on average. The exhaustive search tries every token that may be forced, whatever it costs. On the
world's held-out prompts and on topics that no model was trained on: gold, proxy, coverage (the share of prompts whose
response lies above the 90 % quantile of the base's own, by gold and by proxy) and -log pi_ref.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, data, decoding, policies, rewards, tokens
from jaxalign.prompts import prompt_batch
from jaxalign.types import Array, Completions, Decoded, Params
from jaxalign.worlds import opinions

from . import base, common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies nudging."""

    run: str = "runs/quickstart"
    """Folder of a finished train.quickstart."""
    forms: tuple[int, ...] = (2, 4, 8)
    """Forms per segment of GGRO."""
    entropy: float = 1.0
    """Entropy at which a segment begins [nats]."""
    top_k: int = 25
    """Tokens that may be forced."""
    samples: int = 64
    """Base samples per prompt, for the 90 % quantiles."""


class Found(NamedTuple):
    """What was measured of each prompt's response."""

    proxy: np.ndarray
    """The reward model's number."""
    gold: np.ndarray
    """The program's."""
    surprise: np.ndarray
    """−log pi_ref of the response [nats]."""
    passes: np.ndarray
    """Tokens through models."""


def next_of_all(
    params: Params, tokens: Array, mask: Array, prompt_length: Array, position: Array, candidates: Array
) -> Array:
    """A token score that proposes the candidate after the one that stands at `position`, so that GGRO tries each."""
    stands = candidates == jnp.take_along_axis(tokens, position[:, None], axis=1)
    return jnp.roll(stands, 1, axis=1).at[:, 0].set(False).astype(jnp.float32)


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes nudging.json and nudging.png."""
    common.check(config)
    world = base.load(config.run)
    drift = data.tokenize_prompts(str(world.folder / "data" / "drift.jsonl"), tokens.text_format(world.tokenizer)).rows
    sets = {
        "held-out prompts": world,
        "new topics": world._replace(prompts=[p.text for p in drift], ids=[p.tokens for p in drift]),
    }
    rows = []
    for name, chosen in sets.items():
        rows += [{"prompts": name} | row for row in compare(config, chosen)]
    out = common.report("nudging", config, rows)
    _picture(config, rows, out)
    return rows


def compare(config: Config, world: base.World) -> list[dict[str, Any]]:
    """The rows of one set of prompts."""
    every = base.respond(world, policies.language_model(world.base[0]), world.base[1], n=config.samples, seed=99)
    goal = {name: np.quantile(getattr(every, name), 0.9, axis=1) for name in ("proxy", "gold")}

    def row(method: str, forms: int | None, found: Found, n: int | None = None) -> dict[str, Any]:
        out: dict[str, Any] = {"method": method, "forms": forms, "n": n}
        for name in ("gold", "proxy"):
            out |= common.estimate(name, getattr(found, name))
            out |= common.estimate(f"coverage_{name}", (getattr(found, name) > goal[name]).astype(float))
        return out | common.estimate("surprise", found.surprise) | common.estimate("passes", found.passes)

    prompts = prompt_batch(world.ids)
    policy, eos_ids = policies.language_model(world.base[0]), world.base[0].config.eos_ids
    reward, gain = rewards.from_model(world.reward_model[0]), rewards.token_gradient(world.reward_model[0])
    both = {"policy": world.base[1], "reward": world.reward_model[1]}
    rng = jax.random.key(config.seed)
    options: dict[str, Any] = {"max_new_tokens": opinions.MAX_NEW_TOKENS, "eos_ids": eos_ids}
    guided = both | {"entropy_threshold": config.entropy}
    score = jax.jit(lambda p, prompts, drawn: reward(p, *decoding.join(prompts, drawn), jnp.arange(len(world.ids))))

    def first_above(params: Params, tries: int) -> Decoded[decoding.RejectionInfo]:
        return decoding.first_above(policy, reward, params, rng, prompts, max_tries=tries, chunk=1, **options)

    def measured(drawn: Completions, passes: np.ndarray) -> Found:
        proxy = np.asarray(score(world.reward_model[1], prompts, drawn))
        tokens, mask = np.asarray(drawn.tokens), np.asarray(drawn.mask)
        pairs = zip(tokens, mask, strict=True)
        texts = [world.tokenizer.decode(t[m].tolist(), skip_special_tokens=True) for t, m in pairs]
        gold = np.array([opinions.gold(p, text) for p, text in zip(world.prompts, texts, strict=True)])
        return Found(proxy, gold, -np.asarray(drawn.log_prob_ref).sum(axis=1), np.asarray(passes, np.float64))

    greedy = decoding.sample(policy, world.base[1], rng, prompts, **options, temperature=0.0)
    sampled = decoding.sample(policy, world.base[1], rng, prompts, **options)
    length = np.asarray(prompts.mask).sum(axis=1)
    rows = []
    for name, drawn in (("base", sampled), ("greedy", greedy)):
        rows.append(row(name, None, measured(drawn, np.asarray(drawn.mask).sum(axis=1))))
    response = float(np.asarray(sampled.mask).sum(axis=1).mean())
    # A sample: its tokens once through the model, prompt and response through the reward.
    each = float(length.mean()) + 2 * response
    for forms in config.forms:
        found = decoding.ggro(
            policy, None, gain, guided, rng, prompts, num_samples=forms, top_k=config.top_k, **options
        )
        passes = nudging_passes(found.info, length)
        rows.append(row("GGRO", forms, measured(found.completions, passes)))
        n = max(round(float(passes.mean()) / each), 1)
        best = decoding.best_of_n(policy, reward, both, rng, prompts, num_samples=n, **options).completions
        rows.append(row("best-of-n", forms, measured(best, np.full(len(length), n * each)), n))
        limited = both | {"reward_threshold": goal["proxy"]}
        # As many tries on average as the others have: rows that accept early leave theirs to those that do not. With a
        # higher limit the same draws go on, so that the tries for every limit are known from the highest.
        most = 4 * n
        needed = np.asarray(first_above(limited, most).info.tries)
        tries = max(t for t in range(1, most + 1) if np.minimum(needed, t).mean() * each <= passes.mean() or t == 1)
        first = first_above(limited, tries)
        cost = np.asarray(first.info.tries) * each
        rows.append(row("rejection", forms, measured(first.completions, cost), tries))
    every_token = decoding.ggro(
        policy,
        reward,
        next_of_all,
        guided | {"gradient": None},
        rng,
        prompts,
        num_samples=config.top_k + 1,
        top_k=config.top_k,
        **options,
    )
    rows.append(row("exhaustive", None, measured(every_token.completions, nudging_passes(every_token.info, length))))
    return rows


def nudging_passes(found: decoding.GGROInfo, prompt: np.ndarray) -> np.ndarray:
    """Tokens through models [B]: the policy's steps, the same tokens through the reward, and twice more of them for the
    share of the candidates whose gradient is taken; the prompt once."""
    steps, scored, gradients = (
        np.asarray(x, float) for x in (found.policy_steps, found.reward_passes, found.gradient_passes)
    )
    passes: np.ndarray = steps * (2 + 2 * gradients / np.maximum(scored, 1)) + prompt
    return passes


STYLES = {
    "base": ("black", "s"),
    "greedy": ("#999999", "X"),
    "GGRO": ("#D55E00", "o"),
    "best-of-n": ("#CC79A7", "D"),
    "rejection": ("#0072B2", "^"),
    "exhaustive": ("#009E73", "P"),
}


def _picture(config: Config, rows: list[dict[str, Any]], out: Any) -> None:
    names = {"gold": "gold", "proxy": "learned reward", "coverage_gold": "coverage by gold"}
    names["surprise"] = "-log pi_ref(y)"
    figure, panels = common.pyplot().subplots(2, 4, figsize=(14.5, 6.6), layout="constrained", sharex=True)
    for line, asked in zip(panels, ("held-out prompts", "new topics"), strict=True):
        for axes, (column, title) in zip(line, names.items(), strict=True):
            for method, (colour, marker) in STYLES.items():
                mine = [r for r in rows if r["method"] == method and r["prompts"] == asked]
                axes.errorbar(
                    [r["passes"] for r in mine],
                    [r[column] for r in mine],
                    [r[f"{column}_95"] for r in mine],
                    color=colour,
                    marker=marker,
                    ms=5,
                    lw=1.2,
                    capsize=2,
                    label=method,
                )
            axes.set_xscale("log")
            axes.grid(alpha=0.25)
            axes.set_title(f"{title}, {asked}", fontsize=9.5)
    for axes in panels[1]:
        axes.set_xlabel("tokens through models per response")
    panels[0][0].legend(frameon=False, fontsize=8.5)
    common.save(figure, out / "nudging.png")


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

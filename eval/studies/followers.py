"""python -m eval.studies followers: leaders trained through one follower and answered by another, on the embedded world

--run is the folder of a train.quickstart, of which the world and the base are read; where they are not there yet they
are made as its first two stages make them. Three small transformers lead, each trained by train.shaping through another
follower: the closed form on roll-outs of the base, the base tilted token by token, and a policy that takes a few
gradient steps on roll-outs. On held-out prompts all three followers answer each of them. The world's program is the
utility; intervals are over prompts, and gains over the base are paired. Leaders are kept in RUN/followers, by whose
options a later start has to go on. Minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _io, commands, critics, data, decoding, gibbs, models, policies, rewards, shaping, tokens
from jaxalign._arrays import repeat_rows
from jaxalign.launch import stages
from jaxalign.training import followers, rollouts, shaping_data
from jaxalign.types import Array, TokenBatch
from jaxalign.worlds import opinions

from . import common

NAMES = ("closed_form", "tokens", "trained")


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies followers."""

    run: str = "runs/quickstart"
    """Folder of a train.quickstart, or where its first two stages are to be made."""
    prompts: int = 96
    """Prompts that the leaders are trained on."""
    samples: int = 8
    """Roll-outs, or draws, of each prompt."""
    layers: int = 1
    """Of a leader."""
    bound: float = 3.0
    """Of its reward [units of reward]."""
    beta: float = 1.0
    """KL weight of the followers [units of reward per nat]."""
    candidates: int = 8
    """Next tokens that the follower by tokens weighs."""
    steps: int = 16
    """Steps of each leader."""
    batch: int = 8
    """Prompts of a step."""
    rate: float = 3e-3
    """Learning rate."""
    follower_steps: int = 16
    """Gradient steps of the trained follower."""
    follower_step_size: float = 2.0
    """Size of each [nats per unit of reward]."""


def world(config: Config) -> pathlib.Path:
    """The run's folder, with data/ and sft/."""
    run = pathlib.Path(config.run)
    shared = {"seed": config.seed, "dtype": "float32", "mesh": ""}
    for stage in stages.training_stages(run, "default", shared)[:2]:
        if not (run / {"world": "data/held_out.jsonl", "sft": "sft/model/config.json"}[stage.job]).exists():
            commands.run(stage.job, **stage.options)
    return run


def train(config: Config, run: pathlib.Path) -> dict[str, pathlib.Path]:
    """Follower -> folder of the leader that is trained through it."""
    out, base = run / "followers", run / "sft" / "model"
    out.mkdir(exist_ok=True)
    made = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": config.layers}
    rows = (run / "data" / "prompts.jsonl").read_text().splitlines(keepends=True)
    # Spread over all topics, which the file has in order.
    chosen = np.linspace(0, len(rows) - 1, min(config.prompts, len(rows))).astype(int)
    for name, text in {"config.json": json.dumps(made), "prompts.jsonl": "".join(rows[i] for i in chosen)}.items():
        if not (out / name).exists() or (out / name).read_text() != text:  # what a run was made from stays as it is
            _io.write_text(out / name, text)
    options: dict[str, Any] = {
        "base": str(base),
        "architecture": str(out / "config.json"),
        "tokenizer": str(base),
        "prompts": str(out / "prompts.jsonl"),
        "reward": stages.GOLD,
        "max_new_tokens": opinions.MAX_NEW_TOKENS,
        "max_length": 128,
        "decode_batch": 512,
        "validation": 0.1,
        "batch_size": config.batch,
        "learning_rate": config.rate,
        "seed": config.seed,
    }
    names = ("samples", "bound", "beta", "candidates", "steps", "follower_steps", "follower_step_size")
    options |= {name: getattr(config, name) for name in names}
    for name in NAMES:
        shared = {} if name == NAMES[0] else {"rollouts": str(out / NAMES[0])}
        commands.run("shaping", **options, **shared, follower=name, out=str(out / name))
    return {name: out / name / "model" for name in NAMES}


def answers(config: Config, run: pathlib.Path, leader: pathlib.Path) -> dict[str, followers.Delivered]:
    """Follower -> what it delivers on the held-out prompts where a leader pays; "base" is what nobody pays for."""
    lm, params = models.load(leader)
    base, base_params = models.load(run / "sft" / "model")
    tokenizer = models.tokenizer(run / "sft" / "model")
    prompts = data.tokenize_prompts(run / "data" / "held_out.jsonl", tokens.text_format(tokenizer)).rows
    sources = [prompt.source for prompt in prompts]
    utility, own = rollouts.open_reward(stages.GOLD, base, tokenizer, dtype="float32", sources=sources)
    n, seed = config.samples, config.seed + 1  # other draws than those that the leaders are trained on
    limits: dict[str, Any] = {"max_new_tokens": opinions.MAX_NEW_TOKENS, "eos_ids": base.eos_ids}
    follower = followers.Follower(
        shaping_data.ShapingOptions(follower="tokens", candidates=config.candidates, beta=config.beta),
        lm,
        followers.tilted_base(critics.args(lm), base, candidates=config.candidates),
        base,
        base_params,
        utility,
        own,
        samples=n,
        seed=seed,
        **limits,
    )
    groups = [shaping_data.PromptGroup(prompt.tokens, [], [0.0], row) for row, prompt in enumerate(prompts)]
    batch = jax.tree.map(jnp.asarray, shaping_data.collate_prompts(groups, 128))
    found = {"tokens": followers.delivered(followers.redraw(follower, params, 0, batch))}

    texts = TokenBatch(batch["tokens"], batch["mask"], batch["index"])
    policy, arguments = policies.language_model(base), {"policy": base_params, "reward": own}
    drawn = decoding.best_of_n(policy, utility, arguments, jax.random.key(seed), texts, num_samples=n, **limits).info
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn.samples)
    whole = decoding.join(repeat_rows(texts, n), flat)
    paid = rewards.from_model(lm)(params, *whole, jnp.repeat(batch["index"], n)).reshape(drawn.reward.shape)
    even = jnp.full(paid.shape, -np.log(n))

    def of(log_policy: Array) -> followers.Delivered:
        worth, kl = gibbs.utility(log_policy, drawn.reward), gibbs.kl(log_policy, even)
        return followers.Delivered(np.asarray(worth), np.asarray(kl))

    def inner(theta: Array, reward: Array) -> Array:
        log_policy = jax.nn.log_softmax(theta)
        return (gibbs.utility(log_policy, reward) - config.beta * gibbs.kl(log_policy, even)).sum()

    climbed = shaping.unrolled(
        inner,
        lambda theta, _: jax.nn.log_softmax(theta),
        {"leader": paid, "follower": jnp.zeros_like(paid)},
        steps=config.follower_steps,
        step_size=config.follower_step_size,
    )
    found |= {"base": of(even), "closed_form": of(gibbs.log_policy(even, paid, beta=config.beta))}
    return found | {"trained": of(climbed)}


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes followers.json and followers.png."""
    common.check(config)
    folder = world(config)
    rows: list[dict[str, Any]] = []
    for leader, model in train(config, folder).items():
        found = answers(config, folder, model)
        base = found.pop("base")
        if not rows:
            rows.append({"leader": "none", "follower": "base"} | common.estimate("utility", base.utility))
        for name in NAMES:
            row = {"leader": leader, "follower": name} | common.estimate("utility", found[name].utility)
            row |= common.estimate("gain", found[name].utility - base.utility)
            rows.append(row | common.estimate("kl", found[name].kl))
    out = common.report("followers", config, rows)
    figure, axes = common.pyplot().subplots(figsize=(6, 4), layout="constrained")
    common.bars(axes, rows, NAMES)
    axes.axhline(rows[0]["utility"], color="black", lw=0.8, ls=":", label="base")
    axes.legend(frameon=False, fontsize=8)
    common.save(figure, out / "followers.png")
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

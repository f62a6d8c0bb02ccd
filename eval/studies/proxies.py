"""Learned rewards of two sizes of data for the study `over_optimisation`: ensembles of reward models, a value model and
an autoregressive reward model of each size, and many responses of the base that every one of them scores."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import _io, commands, decoding, models, policies
from jaxalign.launch import stages
from jaxalign.prompts import prompt_batch
from jaxalign.types import Array, Params
from jaxalign.worlds import opinions

from . import base, common


@dataclasses.dataclass(frozen=True)
class Options(common.Options):
    """Options of the learned rewards."""

    run: str = "runs/quickstart"
    """Folder of a finished train.quickstart, whose models are those of all its pairs."""
    pairs: int = 400
    """Preference pairs of the small size."""
    small_epochs: float = 6.0
    """Passes over them of each model."""
    value_epochs: float = 2.0
    """Passes of the small size's value model over its roll-outs."""
    rollouts: int = 4
    """Roll-outs of the base for each training prompt, for that value model."""
    members: int = 3
    """Reward models of each size, of other seeds; the first is the one that is maximised."""
    samples: int = 256
    """Responses of the base to each prompt."""


class Size(NamedTuple):
    """The learned models of one size of data."""

    name: str
    """As it is written in the table."""
    rewards: list[tuple[models.LanguageModel, Params]]
    """The ensemble of reward models."""
    value: tuple[models.LanguageModel, Params]
    """The value of the base's responses under the first reward model, a Q head."""
    arm: tuple[models.LanguageModel, Params]
    """The autoregressive reward model."""


class Table(NamedTuple):
    """Base responses and what is known of them; arrays [prompts, N]."""

    gold: np.ndarray
    """The program's."""
    proxy: np.ndarray
    """[members, prompts, N], in units of each member's standard deviation over all responses, from their mean."""
    novelty: np.ndarray
    """How far the first reward model's hidden state lies from those of the base's responses to other prompts: the
    Mahalanobis distance."""
    scale: tuple[float, float]
    """The first member's mean and standard deviation over all responses."""


def sizes(config: Options, world: base.World) -> list[Size]:
    """Trains what the quickstart has not, in its folder.

    Args:
      config: the options.
      world: the quickstart's.

    Returns:
      The small size and the full one.
    """
    run, out = world.folder, world.folder / "frontier"
    few = out / f"pairs_{config.pairs}.jsonl"
    rows = (run / "data" / "pairs.jsonl").read_text().splitlines()
    if len(rows) <= config.pairs:
        raise ValueError(f"pairs: expected fewer than the run's {len(rows)}, found {config.pairs}")
    out.mkdir(exist_ok=True)
    if not few.exists():  # a run tells by its files' times whether they are those that it began with
        _io.write_text(few, "".join(f"{row}\n" for row in rows[: config.pairs]))
    made = json.loads((run / "reward_model" / "config.json").read_text())
    preset = stages.SIZES[json.loads((run / "results.json").read_text())["preset"]]
    shared: dict[str, Any] = {"model": str(run / "sft" / "model"), "max_length": stages.LENGTH, "batch_size": 64}
    shared |= {"save_every": 100, "log_every": 1000}
    found = []
    for name, data, epochs in ((f"{config.pairs} pairs", few, None), ("all pairs", run / "data" / "pairs.jsonl", 1)):
        label = f"over_{config.pairs if epochs is None else 'all'}"

        def trained(job: str, folder: str, seed: int, **more: Any) -> tuple[models.LanguageModel, Params]:
            commands.run(job, **shared, **more, seed=seed, out=str(out / folder))  # called in this turn
            return models.load(str(out / folder / "model"))

        own = [run / "reward_model"] if epochs else []
        members = [models.load(str(folder / "model")) for folder in own]
        for k in range(len(own), config.members):
            passes = {"epochs": preset.epochs["reward_model"] if epochs else config.small_epochs}
            member = {"data": str(data), "learning_rate": made["learning_rate"]} | passes
            members.append(trained("reward_model", f"{label}_reward_{k}", config.seed + k, **member))
        if epochs:
            value, arm = (models.load(str(run / part / "model")) for part in ("value", "arm"))
        else:
            arm = trained(
                "arm",
                f"{label}_arm",
                config.seed,
                data=str(data),
                epochs=config.small_epochs,
                learning_rate=5e-4,
                beta_r=0.5,
            )
            value = _value(config, world, out, label)
        found.append(Size(name, members, value, arm))
    return found


def _value(config: Options, world: base.World, out: pathlib.Path, label: str) -> tuple[models.LanguageModel, Params]:
    """A Q head trained as the quickstart's, on roll-outs of the base that the small size's first model scores."""
    folder = out / f"{label}_value"
    commands.run(
        "value",
        base=str(world.folder / "sft" / "model"),
        prompts=str(world.folder / "data" / "prompts.jsonl"),
        reward=str(out / f"{label}_reward_0" / "model"),
        max_new_tokens=opinions.MAX_NEW_TOKENS,
        max_length=stages.LENGTH,
        samples=config.rollouts,
        epochs=config.value_epochs,
        head="q",
        learning_rate=1e-3,
        batch_size=64,
        decode_batch=512,
        save_every=100,
        log_every=1000,
        seed=config.seed,
        out=str(folder),
    )
    return models.load(str(folder / "model"))


def table(config: Options, world: base.World, size: Size) -> Table:
    """Draws the base's responses and scores them, once: they are kept in the run's folder.

    Args:
      config: the options.
      world: the quickstart's.
      size: whose reward models score.

    Returns:
      A Table of N = config.samples.
    """
    path = world.folder / "frontier" / f"over_base_{config.samples}_{config.seed}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        parts = _draws(config, world)
        _io.write_arrays(path, parts)
    names = ("tokens", "mask", "gold")
    kept = _io.read_arrays(path, names, then="remove that file, which is made again")
    tokens, mask, gold = (kept[name] for name in names)
    raw, hidden = [], None
    for k, (lm, params) in enumerate(size.rewards):
        score, state = _scores(lm, params, tokens, mask)
        raw.append(score.reshape(gold.shape))
        hidden = state if k == 0 else hidden
    assert hidden is not None
    proxy = np.stack(raw)
    mean, deviation = proxy.mean(axis=(1, 2), keepdims=True), proxy.std(axis=(1, 2), keepdims=True)
    scale = float(mean[0, 0, 0]), float(deviation[0, 0, 0])
    return Table(gold, (proxy - mean) / deviation, novelty(hidden.reshape(*gold.shape, -1)), scale)


def _draws(config: Options, world: base.World) -> dict[str, np.ndarray]:
    """Whole texts [prompts·N, L], and gold [prompts, N]."""
    policy, eos_ids = policies.language_model(world.base[0]), world.base[0].config.eos_ids
    rows, per = len(world.ids), max(base.PER_BATCH // config.samples, 1)
    width = max(len(ids) for ids in world.ids)
    texts, masks, gold = [], [], np.zeros((rows, config.samples))
    for begin in range(0, rows, per):
        part = list(range(begin, min(begin + per, rows)))
        prompts = prompt_batch([world.ids[i] for i in part], index=part, batch_size=per, length=width)
        drawn = decoding.sample(
            policy,
            world.base[1],
            jax.random.key(config.seed + 7),
            prompts,
            num_samples=config.samples,
            max_new_tokens=opinions.MAX_NEW_TOKENS,
            eos_ids=eos_ids,
        )
        flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), drawn)
        repeated = jax.tree.map(lambda x: np.repeat(np.asarray(x), config.samples, axis=0), prompts)
        whole, real, _ = decoding.join(repeated, flat)
        texts.append(np.asarray(whole)[: len(part) * config.samples])
        masks.append(np.asarray(real)[: len(part) * config.samples])
        tokens, valid = np.asarray(drawn.tokens), np.asarray(drawn.mask)
        for i, j in np.ndindex(len(part), config.samples):
            text = world.tokenizer.decode(tokens[i, j][valid[i, j]].tolist(), skip_special_tokens=True)
            gold[part[i], j] = opinions.gold(world.prompts[part[i]], text)
    return {"tokens": np.concatenate(texts), "mask": np.concatenate(masks), "gold": gold}


def _scores(
    lm: models.LanguageModel, params: Params, tokens: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(rewards [R], hidden states [R,D] that they are read from) of whole texts [R,L], as `rewards.from_model` reads
    them."""

    @jax.jit
    def read(params: Params, tokens: Array, mask: Array) -> tuple[Array, Array]:
        at = models.read_index(tokens, mask, lm.reward_pad_id)[:, None]
        hidden = lm.hidden(params, tokens, mask=mask, at=at)
        return lm.head(params, hidden)[:, 0, 0], hidden[:, 0]

    parts = []
    for begin in range(0, len(tokens), base.PER_BATCH):
        rows = slice(begin, begin + base.PER_BATCH)
        room = base.PER_BATCH - len(tokens[rows])
        padded = [np.pad(x[rows], ((0, room), (0, 0)), mode="edge") for x in (tokens, mask)]
        parts.append([np.asarray(x)[: len(tokens[rows])] for x in read(params, *padded)])
    scores, hidden = (np.concatenate(x) for x in zip(*parts, strict=True))
    return scores.astype(np.float64), hidden


def novelty(hidden: np.ndarray) -> np.ndarray:
    """Gives the Mahalanobis distance of hidden states from those of half of the prompts, for the other half each way.

    Args:
      hidden: [prompts, N, D].

    Returns:
      [prompts, N], the distance divided by sqrt(D).
    """
    out = np.zeros(hidden.shape[:2])
    for half in (0, 1):
        seen = hidden[1 - half :: 2].reshape(-1, hidden.shape[2]).astype(np.float64)
        mean = seen.mean(axis=0)
        ridge = 1e-3 * np.eye(len(mean)) * seen.var(axis=0).mean()
        inverse = np.linalg.inv(np.cov(seen.T) + ridge)
        off = hidden[half::2] - mean
        out[half::2] = np.sqrt(np.einsum("pnd,de,pne->pn", off, inverse, off) / len(mean))
    return out

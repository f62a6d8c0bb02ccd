"""What the studies of the embedded world share: a quickstart's models, many base samples, and decoded responses."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import _io, commands, data, decoding, models, policies, rewards, tokens
from jaxalign.prompts import prompt_batch
from jaxalign.types import Params, Policy, Reward
from jaxalign.worlds import opinions

PER_BATCH = 2048  # rows decoded together
TRIES = 4096  # draws of the rejection sampler before it gives up


class World(NamedTuple):
    """A finished quickstart."""

    folder: pathlib.Path
    """The run's folder."""
    tokenizer: Any
    """The base's."""
    base: tuple[models.LanguageModel, Params]
    """The base model and its parameters."""
    reward_model: tuple[models.LanguageModel, Params]
    """The reward model and its parameters."""
    prompts: list[str]
    """The held-out texts."""
    ids: list[list[int]]
    """The token ids of each prompt."""


class Responses(NamedTuple):
    """What was measured of responses; arrays [prompts, n]."""

    proxy: np.ndarray
    """The reward model's number."""
    gold: np.ndarray
    """The program's."""
    loaded: np.ndarray
    """Whether a sentence is loaded to one side."""
    kl: np.ndarray
    """Of the decoder to the base, summed over steps [nats]; 0 for the base."""


def load(run: str) -> World:
    """Reads a finished quickstart.

    Args:
      run: its folder.

    Returns:
      A World.

    Raises:
      ValueError: the folder is not that of a finished train.quickstart.
    """
    folder = pathlib.Path(run)
    if not (folder / "results.json").exists():
        raise ValueError(f"run: expected the folder of a finished train.quickstart, found no results.json in {folder}")
    tokenizer = models.tokenizer(str(folder / "sft" / "model"))
    prompts = data.tokenize_prompts(str(folder / "data" / "held_out.jsonl"), tokens.text_format(tokenizer)).rows
    base, reward_model = (models.load(str(folder / name / "model")) for name in ("sft", "reward_model"))
    return World(folder, tokenizer, base, reward_model, [p.text for p in prompts], [p.tokens for p in prompts])


def political(world: World) -> np.ndarray:
    """Tells which prompts are on a political topic.

    Args:
      world: the quickstart's.

    Returns:
      [prompts] bool.
    """
    return np.array([opinions.topic_of(prompt) in opinions.POLITICAL for prompt in world.prompts])


def respond(
    world: World, policy: Policy, params: Params, *, n: int, seed: int, rows: np.ndarray | None = None
) -> Responses:
    """Draws responses by any Policy and measures them.

    Args:
      world: the quickstart's.
      policy: what is drawn from.
      params: its parameters.
      n: responses per prompt.
      seed: of the draws.
      rows: which prompts; all when None.

    Returns:
      Responses [rows, n].
    """
    chosen = np.arange(len(world.ids)) if rows is None else rows
    reward = rewards.from_model(world.reward_model[0])
    size = max(PER_BATCH // n, 1)
    parts = []
    for begin in range(0, len(chosen), size):
        part = chosen[begin : begin + size]
        prompts = prompt_batch([world.ids[i] for i in part], index=part.tolist(), batch_size=size)
        # The reward is that of the selection, which is not used: every sample is kept.
        drawn = decoding.best_of_n(
            policy,
            reward,
            {"policy": params, "reward": world.reward_model[1]},
            jax.random.key(seed),
            prompts,
            num_samples=n,
            max_new_tokens=opinions.MAX_NEW_TOKENS,
            eos_ids=world.base[0].config.eos_ids,
        ).info
        assert drawn.samples.kl is not None
        kept = drawn.samples.tokens, drawn.samples.mask, drawn.reward, drawn.samples.kl.sum(-1)
        parts.append([np.asarray(x)[: len(part)] for x in kept])
    tokens, mask, proxy, kl = (np.concatenate(x) for x in zip(*parts, strict=True))
    return measure(world, chosen, tokens, mask, proxy, kl)


def measure(
    world: World, rows: np.ndarray, tokens: np.ndarray, mask: np.ndarray, proxy: np.ndarray, kl: np.ndarray
) -> Responses:
    """Measures responses by the world's own program.

    Args:
      world: the quickstart's.
      rows: [R], their prompts.
      tokens: [R,n,T] ids.
      mask: [R,n,T].
      proxy: [R,n], the reward model's.
      kl: [R,n], of the decoder, in nats.

    Returns:
      Responses [R,n].
    """
    gold, loaded = np.zeros(proxy.shape), np.zeros(proxy.shape, bool)
    for i, j in np.ndindex(*proxy.shape):
        ids = tokens[i, j][mask[i, j]].tolist()
        text = world.tokenizer.decode(ids, skip_special_tokens=True)
        prompt = world.prompts[rows[i]]
        gold[i, j] = opinions.gold(prompt, text)
        loaded[i, j] = opinions.features(prompt, text).loaded > 0
    return Responses(proxy.astype(np.float64), gold, loaded.astype(np.float64), kl)


def base_samples(world: World, *, n: int, seed: int) -> Responses:
    """Draws responses of the base to every held-out prompt.

    They are kept in the run's folder, since several studies use them.

    Args:
      world: the quickstart's.
      n: responses per prompt.
      seed: of the draws.

    Returns:
      Responses [prompts, n].
    """
    path = world.folder / "frontier" / f"base_{n}_{seed}.npz"
    if path.exists():
        kept = _io.read_arrays(path, Responses._fields, then="remove that file, which is made again")
        return Responses(**{name: kept[name] for name in Responses._fields})
    found = respond(world, policies.language_model(world.base[0]), world.base[1], n=n, seed=seed)
    path.parent.mkdir(exist_ok=True)
    _io.write_arrays(path, found._asdict())
    return found


def accepted(
    world: World,
    reward: Reward,
    reward_params: Params,
    *,
    beta: float,
    bound: float,
    rows: np.ndarray,
    n: int,
    seed: int,
) -> tuple[Responses, float]:
    """Draws exactly from base·exp(reward/beta)/Z, by rejection.

    Args:
      world: the quickstart's.
      reward: a Reward that is at most bound.
      reward_params: its parameters.
      beta: the KL weight, in units of reward per nat.
      bound: the largest reward.
      rows: [R], which prompts.
      n: responses per prompt.
      seed: of the draws.

    Returns:
      (Responses [R,n], the share of draws that were accepted).
    """
    policy, eos_ids = policies.language_model(world.base[0]), world.base[0].config.eos_ids
    prompts = prompt_batch([world.ids[i] for i in rows], index=rows.tolist())
    params = {"policy": world.base[1], "reward": reward_params, "beta": beta, "bound": bound}
    proxy_of = rewards.from_model(world.reward_model[0])
    score = jax.jit(lambda p, prompts, drawn: proxy_of(p, *decoding.join(prompts, drawn), prompts.index))
    drawn, shares = [], []
    for k in range(n):
        found = decoding.rejection(
            policy,
            reward,
            params,
            jax.random.key(1000 * seed + k),
            prompts,
            max_tries=TRIES,
            chunk=32,
            max_new_tokens=opinions.MAX_NEW_TOKENS,
            eos_ids=eos_ids,
        )
        kept = (
            found.completions.tokens,
            found.completions.mask,
            score(world.reward_model[1], prompts, found.completions),
        )
        drawn.append([np.asarray(x)[: len(rows)] for x in kept])
        shares.append(np.asarray(found.info.accepted)[: len(rows)])
    tokens, mask, proxy = (np.stack(x, axis=1) for x in zip(*drawn, strict=True))
    return measure(world, rows, tokens, mask, proxy, np.zeros_like(proxy)), float(np.mean(shares))


def train_head(
    world: World, name: str, objective: Any, *, bound: float, sharpness: float = 0.0, **changed: Any
) -> tuple[models.LanguageModel, Params]:
    """Trains a head for a shaped reward at beta 1, as the quickstart's value model and on its roll-outs.

    The head is kept in the run's folder.

    Args:
      world: the quickstart's.
      name: of the head's folder.
      objective: of `train.value`.
      bound: the largest reward.
      sharpness: of the sigmoid form; 0 for the step.
      changed: other options of `train.value`.

    Returns:
      (model, parameters).
    """
    out = world.folder / "frontier" / name
    made = json.loads((world.folder / "value" / "config.json").read_text())
    made |= {"objective": objective, "bound": bound, "beta": 1.0, "sharpness": sharpness, "config": ""}
    made |= {"rollouts": str(world.folder / "value"), "out": str(out)}
    commands.run("value", **(made | changed))
    return models.load(str(out / "model"))


def align(
    world: World, name: str, *, prompts: pathlib.Path, bound: float, samples: int, steps: int, seed: int
) -> Params:
    """Trains the base by train.rl on the threshold reward of the learned one at beta 1; it is kept in the run's folder.

    Args:
      world: the quickstart's.
      name: of the policy's folder.
      prompts: a file of the prompts to train on.
      bound: the largest reward.
      samples: base samples per prompt that the thresholds are solved from.
      steps: of training.
      seed: of the draws.

    Returns:
      The policy's parameters.
    """
    out = world.folder / "frontier" / name
    shared: dict[str, Any] = {
        "prompts": str(prompts),
        "reward": str(world.folder / "reward_model" / "model"),
        "max_new_tokens": opinions.MAX_NEW_TOKENS,
        "seed": seed,
    }
    base, table = str(world.folder / "sft" / "model"), out.with_name(f"{name}_table")
    commands.run("calibrate", **shared, base=base, samples=samples, out=str(table))
    options: dict[str, Any] = {"steps": steps, "batch_size": 64, "samples": 4, "learning_rate": 1e-3, "max_length": 128}
    options |= {"bound": bound, "beta": 1.0, "calibration": str(table), "validation": 0.0, "save_every": 20}
    commands.run("rl", **shared, **options, model=base, out=str(out))
    return models.load(str(out / "model"))[1]


def political_prompts(world: World) -> pathlib.Path:
    """Writes the political prompts among those that the run's models were trained on.

    Args:
      world: the quickstart's.

    Returns:
      The file.
    """
    path = world.folder / "frontier" / "political.jsonl"
    if path.exists():
        return path
    rows = (world.folder / "data" / "prompts.jsonl").read_text().splitlines()
    kept = [row for row in rows if opinions.topic_of(json.loads(row)["prompt"]) in opinions.POLITICAL]
    path.parent.mkdir(exist_ok=True)
    _io.write_text(path, "".join(f"{row}\n" for row in kept))
    return path

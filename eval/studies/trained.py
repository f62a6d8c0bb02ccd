"""python -m eval.studies trained: policies that train.rl and train.regress align with calibrated rewards, beside curves

Reads a base, a reward and prompts (by default those of a finished train.quickstart), makes a calibration table, trains
a policy for each transform and KL (at the beta of the closed form; without calibration at the one of base samples), one
by regression on the table's samples for each transform at the middle KL, and baselines from pairs and samples, draws
many responses of each to held-out prompts and to some that were trained on, and sets win rate, best-of-n and worst-of-n
win rates at the KL that was reached beside those of the closed form there.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _io, commands, data, decoding, infalign, metrics, models, policies, rewards, tokens
from jaxalign.prompts import prompt_batch
from jaxalign.training import tables
from jaxalign.types import Params, Policy, Reward

from . import baselines, common, predictions

PER_BATCH = 2048  # rows decoded together
LOSSES = ("reverse", "forward", "square", "centred")
PARTS = {"held_out": "", "training": "train_"}
"""Prompts of a measurement -> prefix of its columns."""


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.studies trained."""

    run: str = "runs/quickstart"
    """Folder with data/prompts.jsonl, data/held_out.jsonl, data/pairs.jsonl, sft/model and reward_model/model, as
    train.quickstart leaves it; trained policies are kept in its trained/."""
    transforms: tuple[str, ...] = ("identity", "exp:5", "exp:-5")
    """Transforms of the calibrated reward; bon_fp:N and won_fp:N are the optimum for best-of-N and worst-of-N."""
    kls: tuple[float, ...] = (0.25, 0.5, 1.0)
    """KL of each policy to the base [nats]."""
    ablation: tuple[str, ...] = ("raw", "raw exp:5")
    """Rewards without calibration, trained at the middle KL: raw, or raw and a transform (of its sigmoid)."""
    regress: tuple[str, ...] = ("reverse", "forward", "centred", "reverse steps=1280", "reverse steps=200 refresh=2")
    """Runs of train.regress, at the middle KL: reverse, forward, square, or centred (square without normaliser), and
    optionally its steps (of each round) and rounds in place of --regress-steps and one."""
    regress_steps: int = 400
    """Optimizer steps of train.regress: at 32 responses each 1280 read as many responses as train.rl does."""
    regress_batch: int = 32
    """Responses of an optimizer step of train.regress."""
    regress_learning_rate: float = 3e-4
    """Peak learning rate of train.regress."""
    on_training: int = 96
    """Prompts that were trained on, to which responses are drawn as well (columns train_…)."""
    baselines: tuple[str, ...] = ("dpo", "ipo", "bonbon", "vbon")
    """Names among dpo, ipo (from the pairs), bonbon (from the table's samples, best of --n) and vbon (RL with the
    logarithm at the beta of best of --n), at one strength each."""
    table: int = 100
    """Base samples per prompt in the calibration table."""
    n: int = 4
    """n of best-of-n and worst-of-n."""
    responses: int = 32
    """Responses per held-out prompt, of the base and of each policy."""
    steps: int = 80
    """Iterations of train.rl."""
    prompts_per_step: int = 64
    """Prompts of an iteration."""
    samples: int = 8
    """Responses per prompt and iteration; with 4 the plain win rate falls 1.5 points further short."""
    learning_rate: float = 1e-3
    """Peak learning rate of train.rl."""
    gold: str = "jaxalign.worlds.opinions:golds"
    """Program of the true utility, reported beside the reward; empty: none."""
    limit: int = 40
    """Longest response [tokens]."""
    name: str = "trained"
    """Name of the files in --out."""


class Drawn(NamedTuple):
    """What was measured of responses to held-out prompts; arrays [prompts, responses]."""

    reward: np.ndarray
    """The reward model's number."""
    gold: np.ndarray
    """The program's."""
    kl: np.ndarray
    """To the base, summed over steps, exact at each [nats]."""


def run(config: Config) -> list[dict[str, Any]]:
    """All rows; writes NAME.json and NAME.png."""
    common.check(config)
    if config.n > config.responses:
        raise ValueError(f"responses: expected at least n = {config.n}, found {config.responses}")
    if config.n < 2:
        raise ValueError(f"n: expected at least 2, found {config.n}")
    for text in config.transforms:
        infalign.parse_transform(text, beta=1.0)
    for name in config.regress:
        regressed(config, name)
    for name in config.baselines:
        if name not in baselines.CURVES:
            raise ValueError(f"baselines: expected some of {', '.join(baselines.CURVES)}, found {name!r}")
    root = pathlib.Path(config.run)
    folders = {name: str(root / name / "model") for name in ("sft", "reward_model")}
    shared: dict[str, Any] = {
        "prompts": str(root / "data" / "prompts.jsonl"),
        "reward": folders["reward_model"],
        "max_new_tokens": config.limit,
        "max_length": 128,
        "seed": config.seed,
    }
    work = root / "trained"
    table = work / f"table_{config.table}"
    commands.run("calibrate", **shared, base=folders["sft"], samples=config.table, out=str(table))
    with np.load(table / tables.REWARDS) as found:
        own = found["reward"]
    given: dict[str, Any] = shared | {
        "model": folders["sft"],
        "samples": config.samples,
        "batch_size": config.prompts_per_step,
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "save_every": 20,
        "validation": 0.0,
    }
    setting = _setting(config, folders)
    base = {part: _draw(config, setting, setting.base, part) for part in PARTS}

    def reached(folder: pathlib.Path | str, transform: str, about: dict[str, Any]) -> dict[str, Any]:
        """The row of a policy; transform: of the closed form that it is held against, "" for none."""
        params, row = models.load(str(folder))[1], about
        for part, prefix in PARTS.items():
            each = compared(_draw(config, setting, params, part), base[part], config)
            known = predictions.at_its_kl(transform, each, config.n) if transform else {}
            found = summary({}, each) | known
            row = row | {f"{prefix}{name}": value for name, value in found.items() if not prefix or "gold" not in name}
        return row

    rows: list[dict[str, Any]] = []
    for label, kl, beta, calibrated, transform in _plan(config, own):
        size = f"{config.steps}x{config.prompts_per_step}x{config.samples}"
        name = f"{label.replace(' ', '_').replace(':', '_')}_{kl:g}_{size}"
        about: dict[str, Any] = {"reward": label, "wanted_kl": kl, "beta": beta}
        options: dict[str, Any] = {"calibration": str(table)} if calibrated else {}
        spent = timed("rl", work / name, **given, **options, beta=beta, transform=transform)
        about |= {"cpu_seconds": spent, "drawn": config.steps * config.prompts_per_step * config.samples}
        rows.append(reached(work / name / "model", transform if calibrated else "", about))
    middle = sorted(config.kls)[len(config.kls) // 2]
    betas = {run.reward: run.beta for run in _plan(config, own) if run.kl == middle}
    for text in config.transforms if config.regress else ():
        for name in config.regress:
            size = f"{config.regress_steps}x{config.regress_batch}"
            where = work / f"{text}_{name}_{middle:g}_{size}".replace(":", "_").replace(" ", "_").replace("=", "_")
            aimed = {"beta": betas[text]} if infalign.needs_beta(text) else {"target_kl": middle}
            spent = timed("regress", where, **regressed(config, name), **aimed, transform=text, table=str(table))
            told = json.loads((where / "summary.json").read_text())
            about = {"reward": f"{text}, {name}", "wanted_kl": middle, "beta": told.get("corrected_beta", told["beta"])}
            about |= {"cpu_seconds": spent, "drawn": told["drawn"]}
            rows.append(reached(where / "model", text, about))
    for name in config.baselines:
        if name == "vbon":
            continue
        folder = baselines.train(
            name,
            base=folders["sft"],
            pairs=root / "data" / "pairs.jsonl",
            table=table,
            n=config.n,
            seed=config.seed,
            out=str(work / f"{name}_{config.n}"),
        )
        about = {"reward": name, "wanted_kl": None, "beta": None, "cpu_seconds": None, "drawn": 0}
        row = reached(folder, baselines.CURVES[name], about)
        if baselines.CURVES[name] == "identity":  # the most that any policy wins alone; no aim of the other two
            known = ("predicted_", "short_of_")
            row = {k: v for k, v in row.items() if "win_rate" in k or not k.removeprefix("train_").startswith(known)}
        rows.append(row)
    out = common.report(config.name, config, rows)
    _picture(config, rows, out)
    return rows


def timed(job: str, out: pathlib.Path, **options: Any) -> float:
    """Runs a job, or finds it finished; gives the seconds of this process's cores that it took when it ran."""
    kept, began = out / "cpu_seconds.json", time.process_time()
    fresh = not (out / "summary.json").exists()
    commands.run(job, **options, out=str(out))
    if fresh or not kept.exists():
        _io.write_json(kept, time.process_time() - began)
    found: float = json.loads(kept.read_text())
    return found


def regressed(config: Config, name: str) -> dict[str, Any]:
    """The options of train.regress for a run of the study. ValueError for another one."""
    loss, *given = name.split(" ")
    sizes = dict(part.split("=", 1) for part in given if "=" in part)
    known = loss in LOSSES and len(sizes) == len(given) and set(sizes) <= {"steps", "refresh"}
    if not known or not all(size.isdigit() and int(size) for size in sizes.values()):
        raise ValueError(f"regress: expected one of {', '.join(LOSSES)}, then steps=N, refresh=N, found {name!r}")
    centred = loss == "centred"
    group = 8 if centred else 1
    steps = int(sizes.get("steps", config.regress_steps))
    return {
        "loss": "square" if centred else loss,
        "normaliser": "centred" if centred else "posterior",
        "group": group,
        "batch_size": max(config.regress_batch // group, 1),
        "steps": steps,
        "refresh": int(sizes.get("refresh", 1)),
        "learning_rate": config.regress_learning_rate,
        "check_every": max(steps // 4, 1),
        "save_every": steps,
        "max_length": 128,
        "seed": config.seed,
    }


class Run(NamedTuple):
    """A policy for train.rl."""

    reward: str
    """Its reward's name in the table."""
    kl: float
    """The KL aimed at [nats]."""
    beta: float
    """KL weight."""
    calibrated: bool
    """Whether the reward is calibrated by the table."""
    transform: str
    """Of the reward, as `parse_transform` reads it; "" for none."""


def _plan(config: Config, own: np.ndarray) -> list[Run]:
    """own: rewards [prompts,K] of base samples, which set beta where the closed form does not. ValueError: a KL that a
    transform does not reach."""
    plan = []
    for text in config.transforms:
        with jax.enable_x64(True):
            betas = predictions.closed_form(text, np.asarray(config.kls), config.n)[0]
        if np.isnan(betas).any():
            raise ValueError(f"kls: expected KLs that {text} reaches at a beta of 1e-5 to 4, found {config.kls}")
        plan += [Run(text, kl, float(beta), True, text) for kl, beta in zip(config.kls, betas, strict=True)]
    if "vbon" in config.baselines:
        plan.append(Run("vbon", float(np.log(config.n) - 1 + 1 / config.n), 1 / (config.n - 1), True, "log"))
    middle = sorted(config.kls)[len(config.kls) // 2]
    for label in config.ablation:
        transform = label.removeprefix("raw").strip()
        squashed = jnp.asarray(1 / (1 + np.exp(-own)))
        scores = np.asarray(infalign.parse_transform(transform)(squashed) if transform else own, np.float64)
        plan.append(Run(label, middle, predictions.beta_for(scores, middle), False, transform))
    return plan


def compared(found: Drawn, base: Drawn, config: Config) -> dict[str, np.ndarray]:
    """Per prompt: KL, gold, and the win rates over the base with and without the procedure."""
    rates = metrics.selection_win_rates(found.reward, base_reward=base.reward)
    return {
        "kl": found.kl.mean(axis=1),
        "win_rate": rates.best_of_n[:, 0],
        "best_of_n": rates.best_of_n[:, config.n - 1],
        "worst_of_n": rates.worst_of_n[:, config.n - 1],
        "gold": found.gold.mean(axis=1),
        "gold_win_rate": metrics.selection_win_rates(found.gold, base_reward=base.gold).best_of_n[:, 0],
    }


def summary(about: dict[str, Any], each: dict[str, np.ndarray]) -> dict[str, Any]:
    """A row: means over prompts with intervals."""
    row = dict(about)
    for name, values in each.items():
        row |= common.estimate(name, values)
    return row


class Setting(NamedTuple):
    """What every measurement shares."""

    policy: Policy
    """Of the base's architecture, the base beside it."""
    reward: Reward
    """The reward model's."""
    base: Params
    """The base's."""
    reward_params: Params
    """The reward model's."""
    tokenizer: Any
    """The base's."""
    eos_ids: tuple[int, ...]
    """The ids that end a response."""
    prompts: dict[str, list[data.Prompt]]
    """"held_out", and "training", of those that were trained on."""


def _setting(config: Config, folders: dict[str, str]) -> Setting:
    lm, base = models.load(folders["sft"])
    reward_lm, reward_params = models.load(folders["reward_model"])
    tokenizer, plain = models.tokenizer(folders["sft"]), policies.language_model(lm)
    form, folder = tokens.text_format(tokenizer), pathlib.Path(config.run) / "data"
    read = {"held_out": "held_out.jsonl", "training": "prompts.jsonl"}
    prompts = {part: data.tokenize_prompts(str(folder / name), form).rows for part, name in read.items()}
    every = prompts["training"]
    prompts["training"] = [
        every[i] for i in np.linspace(0, len(every) - 1, min(config.on_training, len(every))).astype(int)
    ]
    referenced, reward = policies.with_reference(plain, plain), rewards.from_model(reward_lm)
    return Setting(referenced, reward, base, reward_params, tokenizer, lm.config.eos_ids, prompts)


def _draw(config: Config, setting: Setting, params: Params, part_of: str) -> Drawn:
    """Responses of a model to the prompts of a part, beside the base."""
    every, tokenizer = setting.prompts[part_of], setting.tokenizer
    gold = rewards.program(config.gold) if config.gold else None
    size = max(PER_BATCH // config.responses, 1)
    parts: list[Drawn] = []
    for begin in range(0, len(every), size):
        part = every[begin : begin + size]
        index = list(range(begin, begin + len(part)))
        prompts = prompt_batch([p.tokens for p in part], index=index, batch_size=size)
        both: Params = {"policy": {"policy": params, "reference": setting.base}, "reward": setting.reward_params}
        # Another stream for the base than for the policies: equal draws would be ties.
        rng = jax.random.fold_in(jax.random.key(config.seed), int(params is setting.base) + 2 * (part_of == "training"))
        options: dict[str, Any] = {"max_new_tokens": config.limit, "eos_ids": setting.eos_ids}
        found = decoding.best_of_n(
            setting.policy, setting.reward, both, rng, prompts, num_samples=config.responses, **options
        ).info
        assert found.samples.kl is not None
        kept = found.reward, found.samples.tokens, found.samples.mask, found.samples.kl.sum(-1)
        scores, tokens, mask, kl = (np.asarray(x)[: len(part)] for x in kept)
        true = np.zeros(scores.shape)
        if gold is not None:
            texts = [tokenizer.decode(t[m].tolist(), skip_special_tokens=True) for t, m in _pairs(tokens, mask)]
            each = [p.text for p in part for _ in range(config.responses)]
            true = np.asarray(gold(each, texts), np.float64).reshape(scores.shape)
        parts.append(Drawn(scores.astype(np.float64), true, kl))
    return Drawn(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _pairs(tokens: np.ndarray, mask: np.ndarray) -> Any:
    return zip(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]), strict=True)


def _picture(config: Config, rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    figure, panels = common.pyplot().subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288", "#999999", "k")
    fitted = {f"{text}, {name}": (text, name) for text in config.transforms for name in config.regress}
    names = tuple(dict.fromkeys(row["reward"] for row in rows))
    style = {text: colours[i % 10] for i, text in enumerate(name for name in names if name not in fitted)}
    style |= {text: style[transform] for text, (transform, _) in fitted.items()}
    marks = dict.fromkeys(config.transforms, "o") | dict.fromkeys(config.ablation, "s")
    marks |= {text: "Dv<PX*>"[config.regress.index(name) % 7] for text, (_, name) in fitted.items()}
    titles = {
        "win_rate": "win rate",
        "best_of_n": f"win rate, best of {config.n} on both sides",
        "worst_of_n": f"win rate, worst of {config.n} on both sides",
    }
    top = 1.25 * max(row["kl"] for row in rows if row["reward"] in (*config.transforms, *fitted))
    grid = np.linspace(0.02, top, 40)
    with jax.enable_x64(True):
        curves = {text: predictions.closed_form(text, grid, config.n)[1] for text in config.transforms}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for text, curve in curves.items():
            axes.plot(grid, getattr(curve, name), color=style[text], lw=1.2)
        for text, colour in style.items():
            mine = [row for row in rows if row["reward"] == text]
            axes.errorbar(
                [row["kl"] for row in mine],
                [row[name] for row in mine],
                [row[f"{name}_95"] for row in mine],
                [row["kl_95"] for row in mine],
                color=colour,
                ls="",
                marker=marks.get(text, "^"),
                ms=6,
                elinewidth=0.8,
                label=f"{text}, RL" if fitted and text in config.transforms else text,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("KL to the base [nats]")
        axes.grid(alpha=0.25)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8.5, title="lines: closed form")
    common.save(figure, out / f"{config.name}.png")


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

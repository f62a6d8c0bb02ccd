"""Train and decode everything on the embedded world, on a laptop's CPU in minutes:

python -m train.quickstart --out runs/quickstart

Makes the world's texts and preferences, trains tokenizer, base model, reward model, value models, autoregressive reward
model, a DPO model, an RL model on calibrated rewards and heads for Stackelberg-shaped rewards, decodes held-out prompts
by every method of the library at several strengths, and writes results.json, frontier.png (true utility against KL) and
responses.html. A run that was stopped goes on at its stage. Each stage prints what it is: the same files serve as
examples for the training scripts and eval.decode.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxalign import _io, commands, evaluation
from jaxalign.evaluation import plots, report, results
from jaxalign.worlds import opinions

from . import arm, calibrate, dpo, reward_model, rl, sft, value, world

GOLD = "jaxalign.worlds.opinions:golds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.quickstart."""

    out: str
    """Run folder: results.json, frontier.png, responses.html, and a folder per stage."""
    preset: Literal["default", "tiny"] = "default"
    """default: the run of the README, 8 minutes on two CPU cores; tiny: the same training and
    few methods in a minute and a half, too small to learn the world well."""
    seed: int = 0
    """Seed of the world, of all weights and of all draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of weights as they are used."""
    mesh: str = ""
    """data=N: N devices share each batch."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


class Size(NamedTuple):
    """What a preset sets. betas: KL weights [units of the critic's score per nat]."""

    layers: int
    width: int
    texts: int
    pairs: int
    rollouts: int  # per prompt
    epochs: dict[str, float]  # sft, reward_model, value, cd_q, edit, arm, dpo, heads of shaped rewards
    table: int  # base samples per prompt that rewards are calibrated by
    rl_steps: int
    prompts: int
    strengths: dict[str, str]  # of each method, as eval.decode's --method takes them after @
    particles: int
    moves: int
    bounds: tuple[float, ...]  # of shaped rewards [units of reward], at beta 1


SIZES = {
    "default": Size(
        layers=2,
        width=128,
        texts=12_000,
        pairs=6_000,
        rollouts=8,
        epochs={
            "sft": 1.5,
            "reward_model": 1.5,
            "value": 3,
            "cd_q": 1,
            "edit": 2,
            "arm": 1.5,
            "dpo": 0.7,
            "heads": 1.5,
        },
        table=16,
        rl_steps=20,
        prompts=96,
        strengths={
            "best_of_n": "2,4,8,16",
            "args": "4,2,1,0.5,0.25",
            "value": "2,1,0.5,0.25,0.12",
            "cd_q": "2,1,0.5,0.25",
            "blockwise": "4",
            "genarm": "4,2,1,0.5,0.25,0.06",
            "transfer": "1",
            "re_control": "1,4,16",
            "ggro": "4",
            "smc": "1,0.5",
            "quest": "1",
            "cards": "1",
        },
        particles=16,
        moves=16,
        bounds=(6.0,),
    ),
    "tiny": Size(
        layers=1,
        width=64,
        texts=1_500,
        pairs=600,
        rollouts=2,
        epochs={"sft": 1, "reward_model": 1, "value": 1, "cd_q": 1, "edit": 1, "arm": 1, "dpo": 1, "heads": 1},
        table=4,
        rl_steps=2,
        prompts=16,
        strengths={
            "best_of_n": "4",
            "value": "0.5",
            "genarm": "1",
        },
        particles=4,
        moves=4,
        bounds=(2.0,),
    ),
}
LENGTH = 64


def run(config: Config) -> dict[str, Any]:
    """All stages; gives what results.json holds."""
    size = SIZES[config.preset]
    out = _io.open_run(config.out, config)
    clock = Clock(out / "timings.json")
    data = out / "data"
    names = ("sft", "reward_model", "value", "cd_q", "edit", "arm", "dpo", "rl")
    folders = {name: str(out / name / "model") for name in names}
    shared: dict[str, Any] = {
        "seed": config.seed,
        "dtype": config.dtype,
        "mesh": config.mesh,
        "batch_size": 64,
        "max_length": LENGTH,
        "save_every": 100,
        "log_every": 20,
    }
    values = shared | {
        "base": folders["sft"],
        "prompts": str(data / "prompts.jsonl"),
        "reward": folders["reward_model"],
        "samples": size.rollouts,
        "max_new_tokens": opinions.MAX_NEW_TOKENS,
        "decode_batch": 512,
        "learning_rate": 1e-3,
    }
    made: dict[str, Any] = {"rollouts": str(out / "value")}
    pairs = shared | {"data": str(data / "pairs.jsonl"), "model": folders["sft"]}

    def make_world() -> None:
        if not data.exists():
            world.run(
                world.Config(
                    out=str(data),
                    texts=size.texts,
                    pairs=size.pairs,
                    held_out=size.prompts,
                    layers=size.layers,
                    width=size.width,
                    seed=config.seed,
                )
            )

    stages: list[tuple[str, Callable[[], Any]]] = [
        ("world and tokenizer", make_world),
        (
            "base model (sft)",
            lambda: sft.run(
                sft.Config(
                    **shared,
                    out=str(out / "sft"),
                    data=str(data / "texts.jsonl"),
                    architecture=str(data / "config.json"),
                    tokenizer=str(data / "tokenizer"),
                    learning_rate=4e-3,
                    epochs=size.epochs["sft"],
                )
            ),
        ),
        (
            "reward model",
            lambda: reward_model.run(
                reward_model.Config(
                    **pairs, out=str(out / "reward_model"), learning_rate=1e-3, epochs=size.epochs["reward_model"]
                )
            ),
        ),
        (
            "value model",
            lambda: value.run(value.Config(**values, head="q", epochs=size.epochs["value"], out=str(out / "value"))),
        ),
        (
            "value model by Bellman's equation (CD-Q)",
            lambda: value.run(
                value.Config(
                    **values, **made, objective="cd_q", head="q", epochs=size.epochs["cd_q"], out=str(out / "cd_q")
                )
            ),
        ),
        (
            "value on the base's hidden states (RE-Control)",
            lambda: value.run(
                value.Config(
                    **values, **made, objective="td", frozen=True, epochs=size.epochs["edit"], out=str(out / "edit")
                )
            ),
        ),
        (
            "autoregressive reward model",
            lambda: arm.run(
                arm.Config(**pairs, out=str(out / "arm"), learning_rate=5e-4, beta_r=0.5, epochs=size.epochs["arm"])
            ),
        ),
    ]
    stages.append(
        (
            "aligned model (DPO)",
            lambda: dpo.run(
                dpo.Config(**pairs, out=str(out / "dpo"), learning_rate=3e-4, beta=0.3, epochs=size.epochs["dpo"])
            ),
        )
    )
    sampled: dict[str, Any] = {name: values[name] for name in ("prompts", "reward", "max_new_tokens", "seed")}
    stages.append(
        (
            "calibration table",
            lambda: calibrate.run(
                calibrate.Config(
                    **sampled, base=folders["sft"], samples=size.table, dtype=config.dtype, out=str(out / "table")
                )
            ),
        )
    )
    stages.append(
        (
            "aligned model (RL on calibrated rewards)",
            lambda: rl.run(
                rl.Config(
                    **(shared | sampled),
                    model=folders["sft"],
                    calibration=str(out / "table"),
                    transform="identity",
                    beta=0.15,
                    samples=4,
                    steps=size.rl_steps,
                    learning_rate=1e-3,
                    validation=0.0,  # it is measured among the other methods
                    out=str(out / "rl"),
                )
            ),
        )
    )
    heads = {bound: out / f"exceedance_{bound:g}" for bound in size.bounds}
    for bound, folder in heads.items():
        options = values | made | {"head": "q", "epochs": size.epochs["heads"]}
        stages.append((f"exceedance head, bound {bound:g}", _exceedance(options, folder, bound)))
    wanted = {  # method -> (its stage, KIND:DIR as eval.decode takes it)
        "best_of_n": ("base and best-of-n", "best_of_n"),
        "args": ("ARGS", f"args:{folders['reward_model']}"),
        "value": ("CD-FUDGE", f"value:{folders['value']}"),
        "cd_q": ("CD-Q", f"value:{folders['cd_q']}"),
        "blockwise": ("blockwise CD", f"blockwise:value:{folders['value']}"),
        "genarm": ("GenARM", f"genarm:{folders['arm']}"),
        "transfer": ("Transfer Q*", f"transfer:{folders['dpo']}"),
        "re_control": ("RE-Control", f"re_control:{folders['edit']}"),
        "ggro": ("GGRO", "ggro"),
        "smc": ("SMC", f"smc:value:{folders['value']}"),
        "quest": ("QUEST", "quest"),
        "cards": ("CARDS", "cards"),
    }
    groups: dict[str, tuple[str, ...]] = {
        name: (f"{kind}@{size.strengths[method]}",)
        for method, (name, kind) in wanted.items()
        if method in size.strengths
    }
    groups["Stackelberg"] = tuple(f"follower:{folder / 'model'}" for folder in heads.values())
    groups["DPO"] = (f"policy:{folders['dpo']}",)
    groups["RL"] = (f"policy:{folders['rl']}",)
    for name, methods in groups.items():
        stages.append((f"decode: {name}", _comparison(config, out, folders, methods)))
    for i, (name, stage) in enumerate(stages, start=1):
        print(f"[{i}/{len(stages)}] {name}", flush=True)
        with clock.stage(name):
            stage()
    rows = _comparison(config, out, folders, tuple(m for methods in groups.values() for m in methods))()
    records = [r for path in sorted((out / "decode").glob("*/responses.jsonl")) for r in results.read(path)]
    plots.frontier(rows, out / "frontier.png")
    for row in rows:
        row["method"] = plots.label(row["method"])
    found = {"preset": config.preset, "seed": config.seed, "rows": rows, "seconds": clock.seconds}
    _io.write_json(out / "results.json", found)
    report.side_by_side(records, out / "responses.html")
    print()
    results.print_table(rows)
    total = sum(clock.seconds.values())
    print(f"{total:.0f} s in all: " + ", ".join(f"{name} {s:.0f} s" for name, s in clock.seconds.items()))
    print(f"wrote {out / 'results.json'}, {out / 'frontier.png'} and {out / 'responses.html'}; next: docs/real_data.md")
    return found


def _exceedance(values: dict[str, Any], folder: pathlib.Path, bound: float) -> Callable[[], Any]:
    """On the roll-outs of the value model."""
    options: dict[str, Any] = {"objective": "exceedance", "bound": bound, "beta": 1.0}
    return lambda: value.run(value.Config(**values, **options, out=str(folder)))


def _comparison(
    config: Config, out: pathlib.Path, folders: dict[str, str], methods: tuple[str, ...]
) -> Callable[[], list[dict[str, Any]]]:
    """Decodes by the methods that are not decoded yet; gives the rows of all."""
    size = SIZES[config.preset]
    return lambda: evaluation.run(
        evaluation.DecodeOptions(
            model=folders["sft"],
            prompts=str(out / "data" / "held_out.jsonl"),
            reward=folders["reward_model"],
            gold=GOLD,
            num_particles=size.particles,
            num_steps=size.moves,
            max_new_tokens=opinions.MAX_NEW_TOKENS,
            batch_size=size.prompts,
            seed=config.seed,
            dtype=config.dtype,
            mesh=config.mesh,
            out=str(out / "decode"),
            method=methods,
        ),
        quiet=True,
    )


class Clock:
    """Seconds per stage, kept in a file so that a run in several sittings knows them all."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def stage(self, name: str) -> Any:
        import contextlib

        @contextlib.contextmanager
        def timed() -> Any:
            begin = time.perf_counter()
            try:
                yield
            finally:
                self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begin, 2)
                _io.write_json(self.path, self.seconds)

        return timed()


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

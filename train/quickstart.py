"""Train and decode everything on the embedded world, on a laptop's CPU in minutes:

python -m train.quickstart --out runs/quickstart

Makes the world's texts and preferences, trains tokenizer, base model, reward model, value model, autoregressive reward
model and heads for Stackelberg-shaped rewards, decodes held-out prompts with the base, best-of-n, ARGS, CD-FUDGE,
GenARM and the shaped rewards' followers at several strengths, and writes results.json, frontier.png (true utility
against KL) and responses.html. A run that was stopped goes on at its stage. Each stage prints what it is: the same
files serve as examples for train.sft, train.reward_model, train.value, train.arm and eval.decode.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from eval import decode, results
from jaxalign import cli
from train import arm, report, reward_model, sft, value, world

GOLD = "jaxalign.data.opinions:golds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.quickstart."""

    out: str
    """Run folder: results.json, frontier.png, responses.html, and a folder per stage."""
    preset: Literal["default", "tiny"] = "default"
    """default: the run of the README, at most 6 minutes on two CPU cores; tiny: the same stages in little more than a
    minute, too small to learn the world well."""
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
    epochs: tuple[float, float, float, float]  # sft, reward model, value, arm
    prompts: int
    n: tuple[int, ...]
    args: tuple[float, ...]
    value: tuple[float, ...]
    arm: tuple[float, ...]
    bounds: tuple[float, ...]  # of shaped rewards [units of reward], at beta 1


SIZES = {
    "default": Size(
        layers=2,
        width=128,
        texts=12_000,
        pairs=6_000,
        rollouts=8,
        epochs=(2.0, 2.0, 3.0, 2.0),
        prompts=128,
        n=(2, 4, 8, 16),
        args=(4.0, 2.0, 1.0, 0.5, 0.25),
        value=(2.0, 1.0, 0.5, 0.25, 0.12),
        arm=(4.0, 2.0, 1.0, 0.5, 0.25, 0.06),
        bounds=(3.0, 6.0),
    ),
    "tiny": Size(
        layers=1,
        width=64,
        texts=1_500,
        pairs=600,
        rollouts=2,
        epochs=(1.0, 1.0, 1.0, 1.0),
        prompts=16,
        n=(4,),
        args=(1.0,),
        value=(0.5,),
        arm=(1.0,),
        bounds=(2.0,),
    ),
}
LIMIT = 40  # tokens of a response; three sentences take at most 36
LENGTH = 64


def run(config: Config) -> dict[str, Any]:
    """All stages; gives what results.json holds."""
    size = SIZES[config.preset]
    out = cli.open_run(config.out, config)
    clock = Clock(out / "timings.json")
    data = out / "data"
    folders = {name: str(out / name / "model") for name in ("sft", "reward_model", "value", "arm")}
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
        "max_new_tokens": LIMIT,
        "decode_batch": 512,
        "head": "q",
        "learning_rate": 1e-3,
        "epochs": size.epochs[2],
    }
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
                    epochs=size.epochs[0],
                )
            ),
        ),
        (
            "reward model",
            lambda: reward_model.run(
                reward_model.Config(**pairs, out=str(out / "reward_model"), learning_rate=1e-3, epochs=size.epochs[1])
            ),
        ),
        (
            "value model",
            lambda: value.run(value.Config(**values, out=str(out / "value"))),
        ),
        (
            "autoregressive reward model",
            lambda: arm.run(
                arm.Config(**pairs, out=str(out / "arm"), learning_rate=5e-4, beta_r=0.5, epochs=size.epochs[3])
            ),
        ),
    ]
    heads = {bound: out / f"exceedance_{bound:g}" for bound in size.bounds}
    for bound, folder in heads.items():
        stages.append((f"exceedance head, bound {bound:g}", _exceedance(values, out, folder, bound)))
    methods: list[tuple[str, dict[str, Any]]] = [
        ("base and best-of-n", {"best_of_n": size.n}),
        ("ARGS", {"critic": (f"args:{folders['reward_model']}",), "beta": size.args}),
        ("CD-FUDGE", {"critic": (f"value:{folders['value']}",), "beta": size.value}),
        ("GenARM", {"critic": (f"autoregressive:{folders['arm']}",), "beta": size.arm}),
        ("Stackelberg", {"critic": tuple(f"follower:{folder / 'model'}" for folder in heads.values())}),
    ]
    for name, options in methods:
        stages.append((f"decode: {name}", _decoding(config, out, folders, name, options)))
    for i, (name, stage) in enumerate(stages, start=1):
        print(f"[{i}/{len(stages)}] {name}", flush=True)
        with clock.stage(name):
            stage()
    records = [r for name, _ in methods for r in results.read(_folder(out, name) / "responses.jsonl")]
    speeds = [row for name, _ in methods for row in json.loads((_folder(out, name) / "summary.json").read_text())]
    rows = report.rows(records, speeds)
    found = {"preset": config.preset, "seed": config.seed, "rows": rows, "seconds": clock.seconds}
    cli.write_json(out / "results.json", found)
    report.frontier(rows, out / "frontier.png")
    report.side_by_side(records, rows, out / "responses.html")
    print()
    results.print_table(rows)
    total = sum(clock.seconds.values())
    print(f"{total:.0f} s in all: " + ", ".join(f"{name} {s:.0f} s" for name, s in clock.seconds.items()))
    print(f"wrote {out / 'results.json'}, {out / 'frontier.png'} and {out / 'responses.html'}; next: docs/real_data.md")
    return found


def _exceedance(values: dict[str, Any], out: pathlib.Path, folder: pathlib.Path, bound: float) -> Callable[[], Any]:
    """On the roll-outs of the value model."""
    options: dict[str, Any] = {"objective": "exceedance", "bound": bound, "beta": 1.0, "rollouts": str(out / "value")}
    return lambda: value.run(value.Config(**values, **options, out=str(folder)))


def _folder(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / "decode" / name.lower().replace(" ", "_")


def _decoding(
    config: Config, out: pathlib.Path, folders: dict[str, str], name: str, options: dict[str, Any]
) -> Callable[[], Any]:
    return lambda: decode.run(
        decode.Config(
            model=folders["sft"],
            prompts=str(out / "data" / "held_out.jsonl"),
            out=str(_folder(out, name)),
            include_base=name.startswith("base"),
            reward=folders["reward_model"],
            gold=GOLD,
            max_new_tokens=LIMIT,
            batch_size=64 if config.preset == "default" else 8,
            seed=config.seed,
            dtype=config.dtype,
            mesh=config.mesh,
            **options,
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
                cli.write_json(self.path, self.seconds)

        return timed()


def main(args: list[str] | None = None) -> None:
    run(cli.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    main()

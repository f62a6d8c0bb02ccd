"""Train and decode everything on the embedded world, on a laptop's CPU in minutes:

python -m train.quickstart --out runs/quickstart

Makes the world's texts and preferences, trains tokenizer, base model, reward model, value models, autoregressive reward
model, a DPO model, an RL model on calibrated rewards and heads for Stackelberg-shaped rewards, decodes held-out prompts
by every method of the library at several strengths, and writes results.json, frontier.png (true utility against KL) and
report.html, a page to look at the run in a browser (eval.report). A run that was stopped goes on at its stage. Each
stage prints what it is: the same files serve as examples for the training scripts and eval.decode.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxalign import _hosts, _io, commands, evaluation
from jaxalign.evaluation import plots, results
from jaxalign.launch import stages

INSPECTED = 4  # prompts whose responses the report shows token by token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.quickstart."""

    out: str
    """Run folder: results.json, frontier.png, report.html, and a folder per stage."""
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


def run(config: Config) -> dict[str, Any]:
    """Runs all stages, and gives what results.json holds."""
    _hosts.check_single("train.quickstart")
    out = _io.open_run(config.out, config)
    clock = stages.Clock(out / "timings.json")
    shared = {"seed": config.seed, "dtype": config.dtype, "mesh": config.mesh}
    training = stages.training_stages(out, config.preset, shared)
    groups = stages.decoding_groups(out, config.preset)
    options = stages.decode_options(out, config.preset, shared)

    def decode(methods: tuple[str, ...]) -> list[results.Record]:
        """Decodes by the methods that are not decoded yet; gives the rows of all."""
        return evaluation.run(evaluation.DecodeOptions(**options, method=methods, inspect=INSPECTED), quiet=True)

    total = len(training) + len(groups)
    for i, stage in enumerate(training, start=1):
        print(f"[{i}/{total}] {stage.title}", flush=True)
        with clock.stage(stage.title):
            if stage.job != "world" or not (out / "data").exists():
                commands.run(stage.job, **stage.options)
    for i, (title, methods) in enumerate(groups.items(), start=len(training) + 1):
        print(f"[{i}/{total}] decode: {title}", flush=True)
        with clock.stage(f"decode: {title}"):
            decode(methods)
    rows = decode(tuple(method for methods in groups.values() for method in methods))
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
    print(f"wrote {out / 'results.json'} and {out / 'frontier.png'}; next: docs/real_data.md")
    return found


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)

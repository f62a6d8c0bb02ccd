"""--dry-run of files of train/presets; run by test_presets.py in a process of its own with eight simulated devices.

Names of the hub and of run folders are replaced by folders of the same shapes, cut to one layer, without weights.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import re
import time
import tomllib

from eval.bench import shapes
from jaxalign import commands, models
from jaxalign.training import dry_run

PRESETS = pathlib.Path(__file__).parent.parent / "train/presets"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SHAPES = {
    "llama": ("Llama-3.1-8B", "Skywork-Reward-V2-Llama-3.1-8B"),
    "qwen3": ("Qwen3-8B", "Skywork-Reward-V2-Qwen3-8B"),
}
FOLLOWER = models.Head("value", hidden_size=8, follower=models.Follower("exceedance", beta=2.0, bound=12.0))
OF_CRITIC = {"args": "reward", "follower": "follower"}
"""Kind of a method -> its model; the base's shape for others."""


def job_of(name: str) -> str:
    """The job of a preset, whose name its own begins with."""
    return max((job for job in (*commands.jobs("train"), *commands.jobs("eval")) if name.startswith(job)), key=len)


def write_inputs(folder: pathlib.Path) -> None:
    """Models without weights, and rows that are as long as the presets allow."""
    commands.run("world", out=str(folder / "world"), texts=64, pairs=8, held_out=2)
    (folder / "world/tokenizer/chat_template.jinja").write_text(TEMPLATE)
    for family, names in SHAPES.items():
        for role, shape in zip(("base", "reward"), names, strict=True):
            shapes.write(shape, folder / family / role, folder / "world/tokenizer", layers=1)
        shapes.write(names[0], folder / family / "follower", folder / "world/tokenizer", layers=1)
        config = dataclasses.replace(models.read_config(str(folder / family / "base")), head=FOLLOWER)
        (folder / family / "follower/config.json").write_text(json.dumps(models.config_to_hf(config)))
    asked = [{"prompt": "why do cats purr? " * 90 + "why " * i} for i in range(64)]
    pairs = [{**row, "chosen": "a " * 800, "rejected": "the " * 800} for row in asked]
    for path, rows in (("prompts.jsonl", asked), ("pairs.jsonl", pairs)):
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def line_of(name: str, folder: pathlib.Path) -> list[str]:
    """The words of a preset's command, with folders and files that are there."""
    values = tomllib.loads((PRESETS / f"{name}.toml").read_text())
    family = folder / next(family for family in SHAPES if family in name)

    def with_folder(method: str) -> str:
        return re.sub(r"^(\w+):[^@]+", lambda m: f"{m[1]}:{family / OF_CRITIC.get(m[1], 'base')}", method)

    words = {"model": family / "base", "base": family / "base", "reward": family / "reward"}
    words |= {"data": folder / "pairs.jsonl", "prompts": folder / "prompts.jsonl", "out": folder / "out"}
    line = [part for key in words if key in values for part in (f"--{key}", str(words[key]))]
    line += ["--no-include-base"] if job_of(name) == "decode" else []
    return [*line, *(part for method in values.get("method", ()) for part in ("--method", with_folder(method)))]


def main(folder: str, names: list[str]) -> None:
    """Writes NAME.json for each preset: the figures of its dry run, or its error."""
    gc.disable()
    root = pathlib.Path(folder)
    write_inputs(root)
    for name in names:
        began, found = time.process_time(), {"error": "nothing told"}
        try:
            commands.load(job_of(name)).main(["--config", f"preset:{name}", *line_of(name, root), "--dry-run"])
        except dry_run.Told as told:
            found = {} if told.estimate is None else told.estimate._asdict()
        except ValueError as error:
            found = {"error": str(error)}
        (root / f"{name}.json").write_text(json.dumps(found))
        print(f"{name}: {time.process_time() - began:.1f} s", flush=True)

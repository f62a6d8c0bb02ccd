"""python -m eval.bench fits: what training scripts and decoding need of a device for 8B models, on shapes alone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from jaxalign import _io, commands, models

from . import shapes

BASE, REWARD = "Llama-3.1-8B", "Skywork-Reward-V2-Llama-3.1-8B"
PROGRAM = """
import json, sys
from jaxalign import commands
from jaxalign.training import dry_run
try:
    commands.run(sys.argv[1], **json.loads(sys.argv[2]))
except dry_run.Told as told:
    print(json.dumps(told.estimate._asdict()))
"""
LORA = {"lora_rank": 16}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of eval.bench fits."""

    jobs: tuple[str, ...] = ()
    """Names of JOBS; none for all."""
    mesh: tuple[str, ...] = ("data=1", "fsdp=8", "fsdp=8,tensor=2")
    """Meshes, each with one text of --length tokens for each of its data times fsdp devices."""
    length: int = 2048
    """Longest text [tokens], prompt and response."""
    new: int = 128
    """Tokens of a response, of the jobs that draw some."""
    samples: int = 4
    """Responses per prompt, of the jobs that draw several."""
    layers: int = 0
    """Layers of the models; 0: their own number."""
    base: str = BASE
    """Shape of the base."""
    reward: str = REWARD
    """Shape of the reward model."""
    memory: float = 80.0
    """Of a device [GB]."""
    out: str = ""
    """Folder for fits.json, which holds what is known so far and is gone on with; none is written when empty."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def jobs(config: Config, folder: pathlib.Path, rows: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (job, options), of a run on rows · samples texts at most at a time."""
    base, reward = str(folder / "base"), str(folder / "reward")
    pairs = {"data": str(folder / "pairs.jsonl"), "max_length": config.length, "batch_size": rows, "validation": 0.0}
    drawn = {"prompts": str(folder / "prompts.jsonl"), "reward": reward, "max_new_tokens": config.new}
    drawn |= {"samples": config.samples, "max_length": config.length}
    parts = {"batch_size": rows, "accumulate": config.samples}
    rolled = drawn | {"base": base, "decode_batch": rows * config.samples}
    learned = rolled | {"batch_size": rows, "validation": 0.0}
    decoded = {"model": base, "reward": reward, "prompts": drawn["prompts"], "max_new_tokens": config.new}
    decoded |= {"batch_size": rows}
    leader = learned | {"model": reward, "bound": 4.0, "beta": 1.0, "validation": 0.25}
    return {
        "sft": ("sft", pairs | {"model": base}),
        "reward model": ("reward_model", pairs | {"model": base}),
        "reward model, LoRA": ("reward_model", pairs | LORA | {"model": base}),
        "arm, LoRA": ("arm", pairs | LORA | {"model": base}),
        "dpo": ("dpo", pairs | {"model": base}),
        "dpo, LoRA": ("dpo", pairs | LORA | {"model": base}),
        "value": ("value", learned),
        "value, frozen base (RE-Control)": ("value", learned | {"objective": "td", "frozen": True}),
        "shaping, leader of rewards": ("shaping", leader),
        "decode, best of n": ("decode", decoded | {"method": (f"best_of_n@{config.samples}",)}),
        "decode, ARGS by the reward model": ("decode", decoded | {"method": (f"args:{reward}@1",)}),
        "decode, GenARM by a model of the base's size": ("decode", decoded | {"method": (f"genarm:{base}@1",)}),
        "rl, LoRA, model as reward": ("rl", drawn | parts | LORA | {"model": base, "validation": 0.0}),
    }


def run(config: Config) -> list[dict[str, Any]]:
    """Bytes of each device by --dry-run of every job on every mesh, each compiled in a process of its own.

    Prints a row of a Markdown table for each job and mesh, as it is known.
    """
    out = pathlib.Path(config.out) / "fits.json" if config.out else None
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out and out.exists() else []
    print(
        "| step | mesh | trained and optimizer | frozen | temporaries | in all | fits |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _write_inputs(config, folder)
        for title in config.jobs or tuple(jobs(config, folder, 1)):
            for mesh in config.mesh:
                row = next((row for row in rows if (row["step"], row["mesh"]) == (title, mesh)), None)
                if row is None:
                    row = _row(config, folder, title, mesh)
                    rows.append(row)
                    if out:
                        out.parent.mkdir(parents=True, exist_ok=True)
                        _io.write_json(out, {"options": dataclasses.asdict(config), "rows": rows})
                print(_line(row, config.memory), flush=True)
    return rows


def _row(config: Config, folder: pathlib.Path, title: str, mesh: str) -> dict[str, Any]:
    sizes = dict(part.split("=") for part in mesh.split(","))
    rows = math.prod(int(sizes.get(axis, 1)) for axis in ("data", "fsdp"))
    job, options = jobs(config, folder, rows)[title]
    options = options | {"mesh": mesh, "out": str(folder / "out"), "dtype": "bfloat16", "dry_run": True}
    options |= {} if job == "decode" else {"remat": "full"}
    devices = math.prod(int(size) for size in sizes.values())
    begin = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, job, json.dumps(options)],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise RuntimeError(f"{title} on {mesh}: {found.stderr.strip().rpartition(chr(10))[2]}")
    estimate = json.loads(found.stdout.splitlines()[-1])
    return {"step": title, "mesh": mesh, "seconds": round(time.perf_counter() - begin), **estimate}


def _line(row: dict[str, Any], memory: float) -> str:
    size = {name: f"{row[name] / 1e9:.3g} GB" for name in ("frozen", "temporaries", "total")}
    state = f"{(row['parameters'] + row['optimizer']) / 1e9:.3g} GB"
    fits = "yes" if row["total"] <= 0.95e9 * memory else "no"
    cells = (row["step"], row["mesh"], state, size["frozen"], size["temporaries"], size["total"], fits)
    return f"| {' | '.join(cells)} |"


def _write_inputs(config: Config, folder: pathlib.Path) -> None:
    """Folders of the models without weights, and rows longer than any that is read."""
    commands.run("world", out=str(folder / "world"), texts=64, pairs=8, held_out=2)
    for name, shape in (("base", config.base), ("reward", config.reward)):
        shapes.write(shape, folder / name, folder / "world" / "tokenizer", layers=config.layers)
    question = "why do cats purr? "
    tokens = len(models.tokenizer(str(folder / "world" / "tokenizer")).encode(question, add_special_tokens=False))
    prompt, answers = (
        question * ((config.length - config.new - 40) // tokens),
        ("a " * (config.length // 4), "the " * (config.length // 4)),
    )
    asked = [{"prompt": prompt + "why " * i} for i in range(32)]
    pairs = [{**row, "chosen": answers[0], "rejected": answers[1]} for row in asked]
    for path, rows in (("prompts.jsonl", asked), ("pairs.jsonl", pairs)):
        _io.write_lines(folder / path, rows)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

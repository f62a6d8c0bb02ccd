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

import numpy as np

from jaxalign import _io, commands, models
from jaxalign._options import flat, from_fields
from jaxalign.data.text_options import format_of
from jaxalign.training import reading, rollouts, tables

from . import shapes

BASE, REWARD = "Llama-3.1-8B", "Skywork-Reward-V2-Llama-3.1-8B"
PROGRAM = """
import json, sys
from jaxalign import commands
from jaxalign.training import dry_run
for options in json.loads(sys.argv[2]):
    try:
        commands.run(sys.argv[1], **options)
    except dry_run.Told as told:
        print(json.dumps(told.estimate._asdict()), flush=True)
"""
FIGURES = ("parameters", "optimizer", "frozen", "temporaries", "total", "flops_per_token")
"""Those of an estimate that grow with the depth."""
DTYPE = "bfloat16"
"""Of all models, the reward of the calibration table among them."""
Q_HEAD = models.Head("q", hidden_size=4096)
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
    layers: tuple[int, ...] = ()
    """Layers of the models; none: their own number. Of several the figures are those of the line through the first two
    at the models' own number, and it is told how far it lies off at the others."""
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
    base, reward, arm, q, table = (str(folder / name) for name in ("base", "reward", "arm", "q", "table"))
    own = {"model": base, "max_length": config.length, "batch_size": rows, "validation": 0.0}
    pairs = own | {"data": str(folder / "pairs.jsonl")}
    distilled = own | {"calibration": table, "n": config.samples}
    fitted = own | {"table": table, "beta": 1.0}
    drawn = {"prompts": str(folder / "prompts.jsonl"), "reward": reward, "max_new_tokens": config.new}
    drawn |= {"samples": config.samples, "max_length": config.length}
    parts = {"batch_size": rows, "accumulate": config.samples}
    rolled = drawn | {"base": base, "decode_batch": rows * config.samples}
    # Roll-outs of another run: what drawing them takes is the row of calibrate.
    learned = rolled | {"batch_size": rows, "validation": 0.0, "rollouts": table}
    decoded = {"model": base, "reward": reward, "prompts": drawn["prompts"], "max_new_tokens": config.new}
    decoded |= {"batch_size": rows}
    leader = learned | {"model": reward, "bound": 4.0, "beta": 1.0, "validation": 0.25}
    return {
        "sft": ("sft", pairs),
        "reward model": ("reward_model", pairs),
        "reward model, LoRA": ("reward_model", pairs | LORA),
        "arm, LoRA": ("arm", pairs | LORA),
        "dpo": ("dpo", pairs),
        "dpo, LoRA": ("dpo", pairs | LORA),
        "distil": ("distil", distilled),
        "distil, LoRA": ("distil", distilled | LORA),
        "regress": ("regress", fitted),
        "regress, LoRA": ("regress", fitted | LORA),
        "value": ("value", learned),
        "value, frozen base (RE-Control)": ("value", learned | {"objective": "td", "frozen": True}),
        "shaping, leader of rewards": ("shaping", leader),
        "calibrate, and what value and shaping draw": ("calibrate", rolled),
        "decode, best of n": ("decode", decoded | {"method": (f"best_of_n@{config.samples}",)}),
        "decode, ARGS by the reward model": ("decode", decoded | {"method": (f"args:{reward}@1",)}),
        "decode, CD by a Q head of the base's size": ("decode", decoded | {"method": (f"value:{q}@1",)}),
        "decode, GenARM by a model of the base's size": (
            "decode",
            decoded | {"method": (f"genarm:{arm}@1",)},
        ),
        "rl, LoRA, model as reward": ("rl", drawn | parts | LORA | {"model": base, "validation": 0.0}),
    }


def run(config: Config) -> list[dict[str, Any]]:
    """Bytes of each device by --dry-run of every job on every mesh, each compiled in a process of its own.

    Prints a row of a Markdown table for each job and mesh, as it is known.
    """
    own = {shapes.SHAPES[name]["num_hidden_layers"] for name in (config.base, config.reward)}
    if len(config.layers) > 1 and len(own) > 1:
        raise ValueError(f"layers: expected one number for models of {sorted(own)} layers, found {config.layers}")
    if len(set(config.layers)) < len(config.layers):
        raise ValueError(f"layers: expected different numbers, found {config.layers}")
    out = pathlib.Path(config.out) / "fits.json" if config.out else None
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out and out.exists() else []
    print("| step | mesh | trained and optimizer | frozen | temporaries | in all | fits | off the line |")
    print("|---|---|---|---|---|---|---|---|")
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


def at_depth(known: dict[int, dict[str, Any]], layers: int) -> tuple[dict[str, Any], float]:
    """Figures of a depth by the line through two others.

    Args:
      known: layers -> figures of a program that was compiled, two or more.
      layers: the depth.

    Returns:
      The figures, and by how much of itself the sum of a third depth, and of any further one, lies off the line at
      most; 0 where there are two.
    """
    first, second = list(known)[:2]

    def on_line(name: str, depth: int) -> float:
        low, high = known[first][name], known[second][name]
        return float(low + (high - low) * (depth - first) / (second - first))

    found = known[first] | {name: round(on_line(name, layers)) for name in FIGURES}
    return found, max(abs(on_line("total", depth) / own["total"] - 1) for depth, own in known.items())


def _row(config: Config, folder: pathlib.Path, title: str, mesh: str) -> dict[str, Any]:
    sizes = dict(part.split("=") for part in mesh.split(","))
    rows = math.prod(int(sizes.get(axis, 1)) for axis in ("data", "fsdp"))
    depths, devices = config.layers or (0,), math.prod(int(size) for size in sizes.values())
    job, asked = jobs(config, folder, rows)[title][0], []
    for depth in depths:
        options = jobs(config, folder / str(depth), rows)[title][1]
        options = options | {"mesh": mesh, "out": str(folder / "out"), "dtype": DTYPE, "dry_run": True}
        asked.append(options | ({} if job in ("decode", "calibrate") else {"remat": "full"}))
    begin = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, job, json.dumps(asked)],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise RuntimeError(f"{title} on {mesh}: {found.stderr.strip().rpartition(chr(10))[2]}")
    told: list[dict[str, Any]] = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    row: dict[str, Any] = {"step": title, "mesh": mesh, "seconds": round(time.perf_counter() - begin)}
    if len(depths) == 1:
        return row | told[0]
    known = dict(zip(depths, told, strict=True))
    figures, off = at_depth(known, shapes.SHAPES[config.base]["num_hidden_layers"])
    return row | figures | {"depths": known, "off": off}


def _line(row: dict[str, Any], memory: float) -> str:
    size = {name: f"{row[name] / 1e9:.3g} GB" for name in ("frozen", "temporaries", "total")}
    state = f"{(row['parameters'] + row['optimizer']) / 1e9:.3g} GB"
    fits = "yes" if row["total"] <= 0.95e9 * memory else "no"
    off = "" if "off" not in row else f"{row['off']:.1%} at {', '.join(map(str, list(row['depths'])[2:]))} layers"
    cells = (row["step"], row["mesh"], state, size["frozen"], size["temporaries"], size["total"], fits, off)
    return f"| {' | '.join(cells)} |"


def _write_inputs(config: Config, folder: pathlib.Path) -> None:
    """Rows longer than any that is read, and in a folder for each depth models without weights."""
    commands.run("world", out=str(folder / "world"), texts=64, pairs=8, held_out=2)
    question, tokenizer = "why do cats purr? ", folder / "world/tokenizer"
    tokens = len(models.tokenizer(str(tokenizer)).encode(question, add_special_tokens=False))
    prompt = question * ((config.length - config.new - 40) // tokens)
    answers = "a " * (config.length // 4), "the " * (config.length // 4)
    asked = [{"prompt": prompt + "why " * i} for i in range(32)]
    pairs = [{**row, "chosen": answers[0], "rejected": answers[1]} for row in asked]
    for depth in config.layers or (0,):
        place = folder / str(depth)
        for name, shape in (("base", config.base), ("reward", config.reward), ("arm", config.base), ("q", config.base)):
            shapes.write(shape, place / name, tokenizer, layers=depth)
        with_head = dataclasses.replace(models.read_config(str(place / "base")), head=Q_HEAD)
        _io.write_json(place / "q/config.json", models.config_to_hf(with_head))
        for path, rows in (("prompts.jsonl", asked), ("pairs.jsonl", pairs)):
            _io.write_lines(place / path, rows)
        _write_table(config, place)


def _write_table(config: Config, folder: pathlib.Path) -> None:
    """What train.calibrate would write in table/ of responses that are as long as they may be."""
    job, options = jobs(config, folder, 1)["calibrate, and what value and shaping draw"]
    made = from_fields(commands.load(job).Config, options | {"out": str(folder / "table"), "dtype": DTYPE})
    table = pathlib.Path(made.run.out)
    tokenizer, room = models.tokenizer(made.rollouts.base), made.max_length - made.rollouts.max_new_tokens
    form = format_of(made.text, tokenizer)
    prompts = reading.read_prompts(made.rollouts.prompts, form, text=made.text, room=room).rows
    rows = rollouts.longest_rollouts(made.rollouts, prompts)
    shard: dict[str, Any] = {
        "index": [row.row for row in rows],
        "tokens": [row.response for row in rows],
        "length": [len(row.response) for row in rows],
        "reward": [row.reward for row in rows],
    }
    (table / "rollouts").mkdir(parents=True)
    _io.write_json(table / "config.json", flat(made))
    _io.write_arrays(table / "rollouts/00000.npz", shard | {"prompts": rollouts.digest_of(prompts)})
    about = tables.made_with(
        made.rollouts.base,
        made.rollouts.reward,
        tokenizer,
        [prompt.tokens for prompt in prompts],
        max_new_tokens=made.rollouts.max_new_tokens,
        dtype=made.run.dtype,
    )
    reward = np.asarray(shard["reward"], np.float32).reshape(len(prompts), -1)
    tables.write(table, tables.Table(reward, about | {"seed": made.run.seed}))


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))

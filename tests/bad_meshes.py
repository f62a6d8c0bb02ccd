"""What jobs say of meshes that do not fit; run by test_bad_meshes.py in a process of its own with eight simulated
devices. The folders hold configs and tokenizers alone, and reading weights or making some is an error here."""

from __future__ import annotations

import gc
import json
import pathlib
import shutil
from typing import Any, NamedTuple, NoReturn

import tests.conftest  # noqa: F401  # the flags and the cache of compiled programs
from jaxalign import commands, models
from jaxalign.models.hf import tensors
from jaxalign.training import tables
from tests.mesh_jobs import make_rows, word_tokenizer
from tests.on_mesh import CONFIG

SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "reward": {"head": models.Head("reward")},
    "value": {"head": models.Head("value", hidden_size=8)},
    "heads": {"num_heads": 4, "num_kv_heads": 4},
    "rows": {"vocab_size": 36},
    "width": {"hidden_size": 20},
    "columns": {"intermediate_size": 20},
}
"""Folder -> what it has in place of CONFIG's sizes."""
REWARDS = tuple(name for name in SIZES if name not in ("base", "reward", "value"))

PAIRS = "--data {}/pairs.jsonl --max-length 32 --batch-size 8 --model {}/base"
PROMPTS = "--prompts {}/prompts.jsonl --reward {}/reward --max-new-tokens 4"
DRAWN = f"{PROMPTS} --samples 4 --decode-batch 32 --max-length 32 --base {{}}/base"
LINES = {
    "sft": "--data {}/texts.jsonl --max-length 32 --batch-size 8 --model {}/base",
    "reward_model": PAIRS,
    "arm": PAIRS,
    "dpo": PAIRS,
    "distil": "--calibration {}/tables/base --max-length 32 --batch-size 8 --model {}/base",
    "regress": "--table {}/tables/base --beta 1 --max-length 32 --batch-size 8 --model {}/base",
    "value": f"{DRAWN} --batch-size 8",
    "shaping": f"{DRAWN} --batch-size 8 --model {{}}/reward",
    "rl": f"{PROMPTS} --samples 4 --batch-size 8 --max-length 32 --model {{}}/base",
    "calibrate": DRAWN,
    "preferences": DRAWN,
    "decode": f"{PROMPTS} --batch-size 8 --model {{}}/base --method value:{{}}/value@1 --method best_of_n@2",
}
"""Job -> its options on one device."""


class Fault(NamedTuple):
    """A mesh that does not fit."""

    mesh: str
    """Of the command line."""
    changed: dict[str, str]
    """Option -> value in place of the job's own."""
    error: str
    """What the error begins with, as a pattern."""


def faults(job: str) -> dict[str, Fault]:
    """Name -> fault, of all that a job can be given."""
    given = LINES[job]
    found = {
        "devices": Fault("data=16", {}, r"mesh: expected at most 8 devices, found 16 in 'data=16'"),
        "rest": Fault("data=-1,tensor=3", {}, r"mesh: data: expected other sizes whose product divides 8 devices, fo"),
        "axis": Fault("model=8", {}, r"mesh: expected axes of \('data', 'fsdp', 'tensor'\), .* found 'model=8'"),
    }
    rows = r"mesh: expected sizes of data and fsdp whose product divides .* {}, found data=8"
    if "--batch-size" in given:
        size = "20" if job == "rl" else "12"
        of = 5 * 4 if job == "rl" else 12
        found["batch"] = Fault("data=8", {"batch-size": "5" if size == "20" else size}, rows.format(of))
    if "--decode-batch" in given:
        found["roll-outs"] = Fault("data=8", {"decode-batch": "12"}, rows.format(12))
    sizes = {"heads": "num_heads", "rows": "vocab_size", "width": "hidden_size", "columns": "intermediate_size"}
    axes = {"width": "fsdp"}
    for option in ("model", "base", "reward"):
        if f"--{option} " not in given:
            continue
        for folder, size in sizes.items():
            axis = axes.get(folder, "tensor")
            wanted = rf"{option}: {size}: expected a multiple of the mesh's {axis}=8 devices, found \d+ in .*/{folder}"
            changed = {option: f"{{}}/{folder}"}
            if option == "base" and job == "value":
                changed["model"] = "{}/base"  # that of --base by default
            if job in ("distil", "regress"):
                table = "calibration" if job == "distil" else "table"
                changed[table] = f"{{}}/tables/{folder}"  # of the same base
            found[f"{option} {folder}"] = Fault(f"{axis}=8", changed, wanted)
    if job == "regress":  # whose reward is that of its table
        for folder in REWARDS:
            axis = axes.get(folder, "tensor")
            wanted = rf"reward: {sizes[folder]}: expected a multiple of the mesh's {axis}=8 devices, found \d+ in .*"
            found[f"reward {folder}"] = Fault(f"{axis}=8", {"table": f"{{}}/tables/reward_{folder}"}, wanted + folder)
    if "--method" in given:
        wanted = r"value:.*/heads: num_heads: expected a multiple of the mesh's tensor=8 devices, found 4 in .*/heads"
        found["method heads"] = Fault("tensor=8", {"method": "value:{}/heads@1"}, wanted)
    return found


def line_of(job: str, fault: Fault, folder: str) -> list[str]:
    words = LINES[job].split()
    for option, value in fault.changed.items():
        words += [f"--{option}", value]
    return [word.format(folder) for word in [*words, "--mesh", fault.mesh, "--out", "{}/out"]]


def refuse(*args: Any, **options: Any) -> NoReturn:
    raise AssertionError("weights are read or made")


def write_table(root: pathlib.Path, name: str, *, base: str, reward: str) -> None:
    """What is read of a calibration table before its samples are."""
    place = root / "tables" / name
    made = {"out": str(place), "base": str(root / base), "prompts": str(root / "prompts.jsonl")}
    made |= {"reward": str(root / reward), "samples": 4, "max_new_tokens": 4, "max_length": 32}
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(made))
    (place / tables.ABOUT).write_text(json.dumps({"base": tables.folder_digest(root / base)}))


def main(folder: str) -> None:
    """Writes found.json: job -> fault -> the error."""
    gc.disable()
    root = pathlib.Path(folder)
    tokenizer = word_tokenizer()
    for name, changes in SIZES.items():
        config = models.Config(**{**vars(CONFIG), **changes})
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(models.config_to_hf(config)))
        tokenizer.save_pretrained(root / name)
        write_table(root, name, base=name, reward="reward")
    for name in REWARDS:
        write_table(root, f"reward_{name}", base="base", reward=name)
    make_rows(root)
    tensors.read_params = models.LanguageModel.init = models.LanguageModel.init_head = refuse  # type: ignore[assignment]
    found: dict[str, dict[str, str]] = {}
    for job in LINES:
        for name, fault in faults(job).items():
            try:
                commands.load(job).main(line_of(job, fault, folder))
                error = "none"
            except (Exception, SystemExit) as raised:
                error = f"{'' if isinstance(raised, ValueError) else type(raised).__name__ + ': '}{raised}"
            error += " (wrote --out)" if (root / "out").exists() else ""
            shutil.rmtree(root / "out", ignore_errors=True)
            found.setdefault(job, {})[name] = error
    (root / "found.json").write_text(json.dumps(found))

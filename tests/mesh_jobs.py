"""The jobs on meshes of eight simulated devices, as a user runs them, against the same on one; run by test_mesh_jobs.py
in a process of their own, each on the meshes of MESHES_OF. All jobs on all meshes take twice as long:

python -m tests.mesh_jobs FOLDER
"""

from __future__ import annotations

import gc
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import tokenizers
import transformers

from eval import decode
from jaxalign import models
from jaxalign.training import logging
from tests.conftest import on_devices
from tests.on_mesh import MESHES, build, close
from train import arm, calibrate, dpo, reward_model, rl, sft, value

WORDS = ("<eos>", *(f"w{i}" for i in range(1, 32)))
RATE = ("--learning-rate", "0.01")
SHORT = (*RATE, "--steps", "2", "--batch-size", "8", "--max-length", "32", "--log-every", "1", "--validation", "0.25")
TOGETHER = ("--decode-batch", "16", "--shard", "4")
ROLLS = ("--max-new-tokens", "4", "--samples", "4")
DECODE = ("--max-new-tokens", "4", "--batch-size", "8", "--top-k", "4", "--num-particles", "4", "--num-steps", "2")

EACH = "data=2,fsdp=2,tensor=2"
MESHES_OF = {
    "sft": ("fsdp=8", EACH),
    "reward_model": ("data=8", EACH),
    "arm": ("tensor=8", EACH),
    "dpo": (EACH,),
    "value": ("data=8", EACH),
    "rl": ("fsdp=8", EACH),
    "calibrate": (EACH,),
    "decode": ("tensor=8", EACH),
    "decode by transfer": (EACH,),
}
"""Job -> its meshes: one that splits rows, weights and heads, and of most jobs one of a single axis. The passes that
all jobs are made of are compared on every mesh in on_mesh.py."""


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of WORDS."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def make_files(folder: pathlib.Path) -> None:
    """Models whose heads, columns and rows divide over eight devices, and random rows of their words."""
    fast = word_tokenizer()
    heads = {"base": None, "reward": models.Head("reward"), "q": models.Head("q", hidden_size=8), "arm": None}
    for seed, (name, head) in enumerate(heads.items()):
        models.save(folder / name, *build(head, seed, num_layers=1), tokenizer=fast)
    make_rows(folder)


def make_rows(folder: pathlib.Path) -> None:
    """texts.jsonl, pairs.jsonl and prompts.jsonl."""
    rng = np.random.default_rng(0)

    def text(count: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(1, 32, count))

    rows = [{"prompt": text(3), "response": text(4), "chosen": text(4), "rejected": text(3)} for _ in range(32)]
    for name, fields, count in (
        ("texts", ("prompt", "response"), 32),
        ("pairs", ("prompt", "chosen", "rejected"), 32),
        ("prompts", ("prompt",), 8),
    ):
        lines = [json.dumps({field: row[field] for field in fields}) for row in rows[:count]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def commands(folder: pathlib.Path) -> dict[str, tuple[Any, list[str]]]:
    """Name -> (script, its options but --out and --mesh)."""
    base, reward = str(folder / "base"), str(folder / "reward")
    pairs = ["--data", str(folder / "pairs.jsonl"), "--model", base, *SHORT]
    rolled = ["--prompts", str(folder / "prompts.jsonl"), "--reward", reward, *ROLLS]
    methods = f"args:{reward}@1", f"value:{folder / 'q'}@1", f"genarm:{folder / 'arm'}@1", "smc@1"
    transfer = "--no-include-base", "--method", f"transfer:{folder / 'arm'}@1"
    decoded = ["--model", base, "--reward", reward, "--prompts", str(folder / "prompts.jsonl"), *DECODE]
    return {
        "sft": (sft, ["--data", str(folder / "texts.jsonl"), "--model", base, *SHORT]),
        "reward_model": (reward_model, pairs),
        "arm": (arm, [*pairs, "--lora-rank", "2"]),
        "dpo": (dpo, pairs),
        "value": (value, ["--base", base, *rolled, *TOGETHER, *SHORT]),
        "rl": (rl, ["--model", base, *rolled, *SHORT, "--algorithm", "ppo"]),
        # The value model's program draws its responses.
        "calibrate": (calibrate, ["--base", base, *rolled, *TOGETHER, "--max-length", "32"]),
        "decode": (decode, [*decoded, *(part for method in methods for part in ("--method", method))]),
        "decode by transfer": (decode, [*decoded, *transfer]),
    }


def check_same(name: str, one: pathlib.Path, many: pathlib.Path) -> None:
    """The figures, weights, roll-outs and responses of two run folders."""
    if name.startswith("decode"):
        kept = [sorted(run.glob("*/responses.jsonl")) for run in (one, many)]
        assert len(kept[0]) == len(kept[1]) == (5 if name == "decode" else 1)
        for paths in zip(*kept, strict=True):
            a, b = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
            assert [row["tokens"] for row in a] == [row["tokens"] for row in b], paths[0].parent.name
            for key in ("reward", "kl"):
                close([row[key] for row in a], [row[key] for row in b], 1e-4)
        return
    for path in sorted((one / "rollouts").glob("*.npz")):
        with np.load(path) as a, np.load(many / "rollouts" / path.name) as b:
            np.testing.assert_array_equal(a["tokens"], b["tokens"])
            close(a["reward"], b["reward"], 1e-4)
    if name == "calibrate":
        return
    a, b = (logging.read(run / "metrics.jsonl") for run in (one, many))
    assert len(a) == len(b) == 2
    for row, other in zip(a, b, strict=True):
        keys = {"loss", "grad_norm", "reward", "kl", "accuracy"} & set(row)
        if name.startswith("dpo") and row is a[0]:  # the policy is the reference: margins are 0, of a sign by rounding
            keys -= {"accuracy"}
            np.testing.assert_allclose([row["margin"], other["margin"]], 0, atol=1e-6)
        for key in keys:
            np.testing.assert_allclose(row[key], other[key], rtol=2e-4, atol=1e-6, err_msg=f"{name} {key}")
    for params in zip(*(jax.tree.leaves(models.load(run / "model")[1]) for run in (one, many)), strict=True):
        close(*params, 2e-4)
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, many))
    for key, found in a.items():
        if isinstance(found, float):
            np.testing.assert_allclose(found, b[key], rtol=1e-3, atol=1e-4, err_msg=f"{name} {key}")


def main(folder: str, *, all_meshes: bool = False) -> None:
    gc.disable()  # a tenth of the time; the process is short
    root = pathlib.Path(folder)
    make_files(root)
    for name, (script, options) in commands(root).items():
        began = time.perf_counter()
        script.main([*options, "--out", str(root / name / "one")])
        for spec in MESHES if all_meshes else MESHES_OF[name]:
            script.main([*options, "--out", str(root / name / spec), "--mesh", spec])
            check_same(name, root / name / "one", root / name / spec)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    print(on_devices(f"from tests import mesh_jobs; mesh_jobs.main({sys.argv[1]!r}, all_meshes=True)", 8))

"""Two processes on this machine, two simulated devices each, against one process with one device: the same jobs."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from eval import decode
from jaxalign import models
from jaxalign.evaluation import results
from jaxalign.training import logging
from jaxalign.worlds import opinions
from train import calibrate, rl, sft, value, world

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = "tests.test_hosts:lengths"
MAINS = {"sft": sft.main, "rl": rl.main, "value": value.main, "calibrate": calibrate.main, "decode": decode.main}
PROCESSES, DEVICES = 2, 2


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    """Letters of the response: a reward in which nearly every sample differs."""
    return [len(text) / 10 for text in responses]


def start(jobs: pathlib.Path, *, count: int = PROCESSES) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={DEVICES}"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.hosts_program", str(jobs), address, str(count), str(i)],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """(stdout, stderr) of each."""
    found = [process.communicate(timeout=300) for process in processes]
    for process, (_, told) in zip(processes, found, strict=True):
        assert process.returncode == 0, told[-3000:]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Runs of one process in one/ and of two in two/, by the same jobs."""
    folder = tmp_path_factory.mktemp("hosts")
    sizes = ("--texts", "64", "--pairs", "16", "--held-out", "4", "--layers", "1", "--width", "16")
    world.main(["--out", str(folder / "world"), *sizes])
    asked = opinions.prompts()[:9]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    sft.main(SFT.format(folder=folder, out=folder / "base").split()[1:])
    (folder / "jobs.json").write_text(json.dumps(lines(folder, "two")))
    running = start(folder / "jobs.json")
    for line in lines(folder, "one"):
        MAINS[line[0]](line[1:])
    (folder / "told.json").write_text(json.dumps(ended(running)))
    return folder


def lines(folder: pathlib.Path, run: str) -> list[list[str]]:
    """The words of every job; two processes share a mesh of all their devices."""
    out = []
    for name, job in JOBS.items():
        line = job.format(folder=folder, out=folder / run / name).split()
        if run == "two" and line[0] in ("sft", "rl", "value", "decode"):
            line += ["--mesh", f"data={PROCESSES * DEVICES}"]
        out.append(line)
    return out


SFT = (
    "sft --data {folder}/world/texts.jsonl --architecture {folder}/world/config.json "
    "--tokenizer {folder}/world/tokenizer --steps 3 --batch-size 8 --max-length 64 --log-every 1 --out {out}"
)
PROMPTS = "--prompts {folder}/prompts.jsonl --max-new-tokens 6 "
LEARN = "--max-length 64 --learning-rate 1e-3 --log-every 1 --validation 0.4 --steps 2 --out {out} "
RL = "rl --model {folder}/base/model " + PROMPTS + LEARN + "--batch-size 4 --samples 4 "
MODEL = "{folder}/base/model"
JOBS = {
    "sft": SFT,
    "rl_program": RL + "--reward " + PROGRAM,
    "value": "value --base {folder}/base/model --shard 2 --decode-batch 4 --samples 2 --batch-size 8 --reward "
    + PROGRAM
    + " "
    + PROMPTS
    + LEARN,
    "rl_model": RL + "--reward {out}/../value/model",
    "calibrate": "calibrate --base {folder}/base/model --shard 2 --decode-batch 8 --samples 4 --max-length 64 --reward "
    + PROGRAM
    + " "
    + PROMPTS
    + "--out {out}",
    "decode": "decode --model {folder}/base/model --batch-size 4 --reward "
    + PROGRAM
    + " "
    + PROMPTS
    + "--method best_of_n@2,4 --out {out}",
}


def same_numbers(one: object, two: object, *, tolerance: float = 1e-4) -> None:
    if isinstance(one, dict):
        assert set(one) == set(two)
        for name in set(one) - {"tokens_per_second"}:
            same_numbers(one[name], two[name], tolerance=tolerance)
    elif isinstance(one, float):
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)
    else:
        assert one == two


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith(("sft", "rl", "value"))])
def test_two_processes_train_as_one_does(folder, name):
    one, two = folder / "one" / name, folder / "two" / name
    before, after = (logging.read(path / "metrics.jsonl") for path in (one, two))
    assert len(before) == len(after) > 1
    for a, b in zip(before, after, strict=True):
        same_numbers(a, b)
    same_numbers(*(json.loads((path / "summary.json").read_text()) for path in (one, two)))
    (_, a), (_, b) = (models.load(path / "model") for path in (one, two))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["value", "calibrate"])
def test_roll_outs_are_the_same_in_shards_of_each_process(folder, name):
    one, two = (sorted((folder / run / name / "rollouts").iterdir()) for run in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for a, b in zip(one, two, strict=True):
        with np.load(a) as x, np.load(b) as y:
            assert all((x[key] == y[key]).all() for key in ("index", "tokens", "length", "prompts"))
            np.testing.assert_allclose(x["reward"], y["reward"], rtol=1e-5)


def test_two_processes_decode_as_one_does(folder):
    for method in ("base", "best_of_n"):
        one, two = (results.read(folder / run / "decode" / method / "responses.jsonl") for run in ("one", "two"))
        assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
        assert [r["index"] for r in one] == [r["index"] for r in two]
        same_numbers({str(i): r["reward"] for i, r in enumerate(one)}, {str(i): r["reward"] for i, r in enumerate(two)})
    assert not list((folder / "two/decode").rglob("*.partial*"))
    assert (folder / "two/decode/frontier.png").exists()

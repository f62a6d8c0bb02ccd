"""Two processes on this machine, two simulated devices each, against one process with one device: the same jobs."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from eval import decode
from jaxalign import _hosts, commands, models
from jaxalign.evaluation import results
from jaxalign.launch import processes
from jaxalign.training import logging
from jaxalign.worlds import opinions
from train import calibrate, rl, sft, value, world

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM, PICKY = f"{__name__}:lengths", f"{__name__}:picky"
MAINS = {"sft": sft.main, "rl": rl.main, "value": value.main, "calibrate": calibrate.main, "decode": decode.main}
PROCESSES, DEVICES = 2, 2

SFT = (
    "sft --data {folder}/world/texts.jsonl --architecture {folder}/world/config.json --tokenizer "
    "{folder}/world/tokenizer --steps 3 --batch-size 8 --max-length 64 --log-every 1 --save-every 2 --out {out}"
)
DRAWN = "{folder}/base/model --prompts {folder}/prompts.jsonl --max-new-tokens 6 --out {out} --reward "
LEARN = " --max-length 64 --learning-rate 1e-3 --log-every 1 --validation 0.4 --steps 2"
RL = f"rl --batch-size 4 --samples 4{LEARN} --model {DRAWN}"
JOBS = {
    "sft": SFT,
    "resumed": SFT,
    "rl_program": RL + PROGRAM,
    "value": f"value --shard 2 --decode-batch 4 --samples 2 --batch-size 8{LEARN} --base {DRAWN}{PROGRAM}",
    "rl_model": RL + "{run}/value/model --lora-rank 2",
    "calibrate": f"calibrate --shard 2 --decode-batch 4 --samples 2 --max-length 64 --base {DRAWN}{PROGRAM}",
    "decode": f"decode --batch-size 4 --method best_of_n@2 --model {DRAWN}{PROGRAM}",
}
MESHES = {"rl_model": "data=2,fsdp=2", "resumed": "fsdp=4", "calibrate": ""}
"""Job -> its mesh over both processes; data=4 where it is not named."""
REFUSED = {
    "half": (SFT + " --mesh data=2", r"mesh: expected all 4 devices of the 2 processes, found 2 in 'data=2'"),
    "none": (SFT, r"mesh: expected one of all 4 devices of the 2 processes, as in data=4, found none"),
    "apart_PROCESS": (
        SFT + " --mesh data=4",
        r"out: expected a folder that all 2 processes share, found no config.json of process 0 in .* on process 1 ",
    ),
    "unlike": (SFT + " --mesh data=4 --seed PROCESS", r"seed: expected 0 of the run in .*, found 1; "),
    "picky": (RL.replace("0.4", "0") + PICKY + " --mesh data=4", r".*reward: expected words, found none in process 1"),
    "world": ("world --out {out}", r"processes: expected one process for train.world, found 2"),
    "bench": ("bench train", r"processes: expected one process for jaxalign bench, found several"),
}
"""Job -> (its words, what its error is like)."""


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    """Letters of the response: a reward in which nearly every sample differs."""
    return [len(text) / 10 for text in responses]


def picky(prompts: list[str], responses: list[str]) -> list[float]:
    """A program that fails in one of the processes."""
    if jax.process_index() == 1:
        raise ValueError("reward: expected words, found none in process 1")
    return lengths(prompts, responses)


def start(command: list[str]) -> list[subprocess.Popen[str]]:
    """Starts a process for each index; COORDINATOR and PROCESS in words stand for its address and its index."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={DEVICES}"
    return [
        subprocess.Popen(
            [sys.executable, "-m", *(w.replace("COORDINATOR", address).replace("PROCESS", str(i)) for w in command)],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(PROCESSES)
    ]


def end(running: list[subprocess.Popen[str]]) -> None:
    """Kills what still runs, and closes the pipes of all: one left open would be told of in a later test."""
    for process in running:
        process.kill()
    for process in running:
        process.communicate()


def told_by(running: list[subprocess.Popen[str]], *, timeout: float) -> list[str]:
    """What each process writes to its stderr, of which none is left running [timeout in s]."""
    try:
        return [process.communicate(timeout=timeout)[1] for process in running]
    finally:
        end(running)


def words(job: str, folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    return job.format(folder=folder, out=out, run=out.parent).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Runs of one process in one/ and of two in two/, by the same jobs; 0.json and 1.json hold the errors of two."""
    folder = tmp_path_factory.mktemp("hosts")
    sizes = ("--texts", "64", "--pairs", "16", "--held-out", "4", "--layers", "1", "--width", "16")
    world.main(["--out", str(folder / "world"), *sizes])
    asked = opinions.prompts()[:9]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    sft.main(words(SFT, folder, folder / "base")[1:])
    shutil.copytree(folder / "base", folder / "one/sft")
    begin_again(folder / "base", folder / "two/resumed")
    jobs = []
    for name, job in JOBS.items():
        mesh = MESHES.get(name, "data=4")
        jobs.append([*words(job, folder, folder / "two" / name), *(("--mesh", mesh) if mesh else ())])
    jobs += [words(job, folder, folder / "refused" / name) for name, (job, _) in REFUSED.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    running = start(["tests.hosts_program", str(folder / "jobs.json"), "COORDINATOR", str(PROCESSES), "PROCESS"])
    try:
        for name, job in JOBS.items():
            if name not in ("sft", "resumed"):
                MAINS[job.split()[0]](words(job, folder, folder / "one" / name)[1:])
        for process in running:
            printed, told = process.communicate(timeout=200)
            assert process.returncode == 0, told[-3000:]
            assert ("wrote" in printed) == (process is running[0])
    finally:
        end(running)
    for i in range(PROCESSES):
        assert json.loads((folder / f"{i}.json").read_text())[: len(JOBS)] == [""] * len(JOBS)
    return folder


def begin_again(run: pathlib.Path, copy: pathlib.Path) -> None:
    """A copy of a run as it was after its second checkpoint."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "model")
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["2", "3"]
    shutil.rmtree(copy / "checkpoints/3")


def same_numbers(one: object, two: object, *, tolerance: float = 1e-4) -> None:
    if isinstance(one, dict):
        assert isinstance(two, dict)
        assert set(one) == set(two)
        for name in set(one) - {"tokens_per_second"}:
            same_numbers(one[name], two[name], tolerance=tolerance)
    elif isinstance(one, float):
        np.testing.assert_allclose(two, one, rtol=tolerance, atol=tolerance)
    else:
        assert one == two


def same_training(one: pathlib.Path, two: pathlib.Path) -> None:
    before, after = (logging.read(path / "metrics.jsonl") for path in (one, two))
    assert len(before) == len(after) > 1
    for a, b in zip(before, after, strict=True):
        same_numbers(a, b)
    same_numbers(*(json.loads((path / "summary.json").read_text()) for path in (one, two)))
    (_, a), (_, b) = (models.load(path / "model") for path in (one, two))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sft", "rl_program", "value", "rl_model"])
def test_two_processes_train_as_one_does(folder, name):
    same_training(folder / "one" / name, folder / "two" / name)


def test_a_run_goes_on_with_another_number_of_processes_and_another_mesh(folder):
    same_training(folder / "one/sft", folder / "two/resumed")  # two went on with what one began
    begin_again(folder / "two/sft", folder / "one/resumed")
    sft.main(words(SFT, folder, folder / "one/resumed")[1:])
    same_training(folder / "one/sft", folder / "one/resumed")


@pytest.mark.parametrize("name", ["value", "calibrate"])
def test_roll_outs_are_the_same_in_shards_of_each_process(folder, name):
    one, two = (sorted((folder / run / name / "rollouts").iterdir()) for run in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for a, b in zip(one, two, strict=True):
        with np.load(a) as x, np.load(b) as y:
            assert all((x[key] == y[key]).all() for key in ("index", "tokens", "length", "prompts"))
            np.testing.assert_allclose(x["reward"], y["reward"], rtol=1e-5)


def test_two_processes_decode_as_one_does(folder):
    for method in ("base", "best_of_n_2"):
        one, two = (results.read(folder / run / "decode" / method / "responses.jsonl") for run in ("one", "two"))
        assert len(one) == len(two) > 0
        for a, b in zip(one, two, strict=True):
            assert [a[name] for name in ("index", "method", "tokens")] == [
                b[name] for name in ("index", "method", "tokens")
            ]
            same_numbers(a["reward"], b["reward"])
    assert not list((folder / "two/decode").rglob("*.partial*"))
    assert (folder / "two/decode/frontier.png").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_every_process_refuses_what_does_not_fit_in_one_line(folder, name):
    at = len(JOBS) + list(REFUSED).index(name)
    for i in range(PROCESSES):
        found = json.loads((folder / f"{i}.json").read_text())[at]
        assert re.match(REFUSED[name][1], found), found


def test_a_process_that_fails_ends_the_others(tmp_path):
    """The first has no such file, the second would wait for it."""
    (tmp_path / "1.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "config.json").write_text("{}")
    job = f"train.sft --data {tmp_path}/PROCESS.jsonl --architecture {tmp_path}/config.json --tokenizer {tmp_path}"
    job += f" --mesh data=4 --batch-size 4 --out {tmp_path}/out_PROCESS"
    running = start([*job.split(), "--coordinator", "COORDINATOR", "--num-processes", "2", "--process-id", "PROCESS"])
    told = told_by(running, timeout=120)
    assert all(process.returncode != 0 for process in running)
    errors = [line for text in told for line in text.splitlines() if line.startswith("error: process ")]
    assert errors
    assert all("Traceback" not in text for text in told)


KEPT = """
import pathlib
unlink = pathlib.Path.unlink

def refuse(path, *args, **options):
    if path.name == {name!r}:
        raise PermissionError(1, "Operation not permitted", str(path))
    return unlink(path, *args, **options)

pathlib.Path.unlink = refuse
"""


def test_a_process_that_cannot_write_ends_the_others_with_its_error(folder, tmp_path, monkeypatch):
    """The first must not remove what a kill has left; nobody waits for it."""
    begin_again(folder / "base", tmp_path / "run")
    blocked = "1.orbax-checkpoint-tmp-1"
    (tmp_path / "run/checkpoints" / blocked).touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(KEPT.format(name=blocked))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    job, *options = words(SFT, folder, tmp_path / "run")
    given = ["--coordinator", "COORDINATOR", "--num-processes", "2", "--process-id", "PROCESS"]
    running = start([f"train.{job}", *options, "--mesh", "data=4", *given])
    told = told_by(running, timeout=150)
    assert [process.returncode for process in running] == [1, 1], told
    for i, text in enumerate(told):
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: process {i} of 2: "), line
        assert blocked in line, line


# One process ----------------------------------------------------------------------------------------------------------


def test_words_about_processes_are_taken_out_of_a_command_line(monkeypatch):
    for number, total in processes.TASKS.items():
        monkeypatch.delenv(number, raising=False)
        monkeypatch.delenv(total, raising=False)
    assert processes.take(["sft", "--out", "x"]) == (None, ["sft", "--out", "x"])
    assert processes.take(["--distributed", "sft"]) == (processes.Processes(), ["sft"])
    given = ["--coordinator", "node1:1234", "sft", "--num-processes=2", "--process-id", "1", "--seed", "3"]
    assert processes.take(given) == (processes.Processes("node1:1234", 2, 1), ["sft", "--seed", "3"])
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes.take(["sft"])[0] is None
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert processes.take(["sft"])[0] == processes.Processes()


def test_help_names_the_words_about_processes():
    assert all(word in commands._help() for word in ("--distributed", *processes.WORDS))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--process-id", "0"], r"coordinator: expected --coordinator HOST:PORT with --process-id"),
        (["--coordinator", "a:1", "--num-processes"], r"num-processes: expected --num-processes N with --coordinator"),
        (
            ["--coordinator", "a", "--num-processes", "2", "--process-id", "0"],
            r"coordinator: expected HOST:PORT",
        ),
        (["--coordinator", "a:1", "--num-processes", "0", "--process-id", "0"], r"num-processes: expected an integer"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], r"process-id: expected one below"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "-1"], r"process-id: expected an integer"),
    ],
)
def test_words_about_processes_are_checked(given, error):
    with pytest.raises(ValueError, match="^" + error):
        processes.take(given)


def test_distributed_without_a_cluster_is_an_error(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: (_ for _ in ()).throw(ValueError("no address")))
    with pytest.raises(ValueError, match=r"^distributed: expected a process of Slurm, .* or --coordinator"):
        processes.start(processes.Processes())


def test_one_process_has_everything():
    assert (_hosts.count(), _hosts.index(), _hosts.label()) == (1, 0, "")
    assert _hosts.dealt([3, 4, 5]) == [3, 4, 5]
    assert _hosts.from_first("text") == "text"
    np.testing.assert_array_equal(_hosts.in_shares(lambda x: x.sum(1), np.ones((3, 2))), [2, 2, 2])
    with pytest.raises(KeyError), _hosts.together():
        raise KeyError("own")


def test_arrays_of_several_processes_are_fetched_and_placed_in_one_file_alone():
    alone = {"device_get", "process_allgather", "addressable_data", "addressable_shards", "sync_global_devices"}
    alone |= {"broadcast_one_to_all", "make_array_from_process_local_data"}
    found = {}
    for path in [*(ROOT / "jaxalign").rglob("*.py"), *(ROOT / "train").rglob("*.py"), ROOT / "eval/decode.py"]:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if names & alone:
            found[str(path.relative_to(ROOT))] = sorted(names & alone)
    # A tensor is written from its shards where one process holds all of them.
    assert set(found) <= {"jaxalign/_hosts.py", "jaxalign/models/hf/tensors.py"}, found

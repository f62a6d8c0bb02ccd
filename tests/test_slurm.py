"""docs/two_nodes.slurm: its syntax, and the commands that its tasks run."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess

import pytest

from jaxalign import commands
from jaxalign.launch import processes
from train import dpo

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "docs/two_nodes.slurm"
PROGRAMS = {
    "scontrol": 'printf "node7\\nnode8\\n"',
    "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i SLURM_NTASKS=2 "$@"; done',
    "python": 'IFS="|"; printf "%s\\n" "$*"',
}
"""What stands in for Slurm, and for the job."""


def example() -> list[str]:
    """The words after the script in the line of docs/scale.md."""
    (line,) = re.findall(r"^sbatch docs/two_nodes.slurm (.*)$", (ROOT / "docs/scale.md").read_text(), re.MULTILINE)
    return shlex.split(line)


def run(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[7-8]", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["bash", SCRIPT, *words], env=slurm, capture_output=True, text=True, check=False)


def test_the_script_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0


def test_each_task_of_the_script_is_one_process_of_the_job(tmp_path):
    found = run(tmp_path, *example())
    assert found.returncode == 0, found.stderr
    lines = [line.split("|") for line in found.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["-m", "train.dpo"]] * 2
    for i, (_, _, *words) in enumerate(lines):
        joined, rest = processes.take(words)
        assert joined == processes.Processes("node7:21234", 2, i)
        assert rest == example()[1:]
    options = commands.parse(dpo.Config, description="", args=rest)
    assert options.mesh.mesh == "fsdp=8,tensor=2"


def test_a_task_keeps_words_with_spaces_whole(tmp_path):
    found = run(tmp_path, "train.rl", "--reward", "DIR - 0.1 * MODULE:FUNCTION")
    assert found.stdout.splitlines()[0].startswith("-m|train.rl|--reward|DIR - 0.1 * MODULE:FUNCTION|--coordinator|")


def test_a_script_without_a_job_says_what_it_expects(tmp_path):
    found = run(tmp_path)
    assert found.returncode != 0
    assert "expected a job and its options" in found.stderr


@pytest.mark.parametrize("word", sorted(set(re.findall(r"--[a-z-]+", SCRIPT.read_text().partition("set -euo")[2]))))
def test_the_words_of_the_script_are_known(word):
    known = {"--distributed", "--out", "--data", *processes.WORDS, "--ntasks-per-node", "--kill-on-bad-exit"}
    assert word in known

"""Jobs that are killed and started again leave what an uninterrupted run leaves (`tests.kill_jobs`)."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.kill_jobs import Row, read_plan, table
from tests.kill_places import PLACES

PLAN = "sft: start full checkpoint TERM model summary; decode: file INT partial; decode of two: random HUP TERM"
"""Each place, and a job of two processes."""


def killed(*words: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "tests.kill_jobs", *words],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
    assert found.stdout.endswith("; 0 faults\n"), found.stdout
    return found.stdout


def test_twelve_kills_leave_no_fault():
    assert {place for _, places in read_plan(PLAN) for place in places} == set(PLACES)
    assert "\n12 kills, " in killed("--plan", PLAN)


def test_a_place_at_which_no_kill_came_is_a_fault_and_named():
    told = table({("sft", "start"): Row(2, 1), ("sft", "model"): Row(0, 8), ("decode", "TERM"): Row(1, 0, ("odd",))})
    assert told.splitlines() == [
        "| job | start | model | TERM | missed | faults |",
        "|---|---|---|---|---|---|",
        "| sft | 2 | none of 8 | 0 | 9 | 0 |",
        "| decode | 0 | – | 1 | 0 | 1 |",
        "never killed: sft, model (8 starts)",
        "3 kills, 9 starts that ended before; 2 faults",
    ]


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2])
def test_hundreds_of_kills_leave_no_fault(seed):
    assert "200 kills" in killed(
        "--kills", "200", "--seed", str(seed), "--workers", str(max((os.cpu_count() or 2) // 2, 1))
    )

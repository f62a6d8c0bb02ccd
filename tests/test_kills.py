"""Jobs that are killed and started again leave what an uninterrupted run leaves (`tests.kill_jobs`)."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest


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
    told = killed("--kills", "12", "--starts", "4", "--jobs", "sft,calibrate,decode")
    assert re.search(r"^12 kills, \d of them", told, re.MULTILINE), told


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2])
def test_hundreds_of_kills_leave_no_fault(seed):
    assert "200 kills" in killed("--kills", "200", "--seed", str(seed))

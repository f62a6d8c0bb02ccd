"""Checkpoints on storage that is full: one line and exit code 1, and nothing else on stderr."""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from jaxalign.training import checkpoints
from tests.kill_checks import judged
from tests.kill_places import Process

ROOT = pathlib.Path(__file__).parent.parent
SAVES = """
import resource, sys
import jax.numpy as jnp, numpy as np
from jaxalign import commands
from jaxalign.training import checkpoints
from tests.test_damage import State

def save(words):
    arrays = {str(i): jnp.asarray(np.random.default_rng(i).normal(size=900)) for i in range(40)}
    with checkpoints.opened(words[0]) as manager:
        if len(words) > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(words[1]),) * 2)
        for step in range(1, 9):
            checkpoints.save(manager, State(jnp.asarray(step), arrays), {"step": step})

commands.execute(save)
"""
MOUNTED = 'mount -t tmpfs -o size="$1" none "$2" || exit 9; shift 2; exec "$@"'
"""Shell words that give a process and its children a small file system of its own at a folder."""


def small(folder: pathlib.Path, size: str) -> list[str]:
    """The words before a command for which a folder holds no more than `size`; [] where nobody may mount."""
    alone = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    words = [*alone, "sh", "-c", MOUNTED, "sh", size, str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        return []
    return words


def saved(out: pathlib.Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", SAVES, str(out), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def check_one_line(found: subprocess.CompletedProcess[str]) -> None:
    lines = [f"{line[:300]}" for line in found.stderr.splitlines()]
    assert len(lines) == 1, lines[:5]
    assert lines[0].startswith("error: OSError: checkpoints: expected to save in")
    assert found.returncode == 1


@pytest.mark.parametrize("most", ["1000", "3000"])
def test_a_save_of_many_arrays_whose_files_are_too_long_is_one_line(tmp_path, most):
    check_one_line(saved(tmp_path / "c", most))


@pytest.mark.parametrize("size", ["100k", "400k"])
def test_a_save_of_many_arrays_on_a_full_disk_is_one_line(tmp_path, size):
    if not (before := small(tmp_path, size)):
        pytest.skip("this system lets its users mount nothing")
    check_one_line(saved(tmp_path / "c", before=tuple(before)))


def test_what_others_say_of_their_own_tasks_is_heard(tmp_path, caplog):
    with checkpoints.opened(tmp_path):
        pass
    log = logging.getLogger("asyncio")
    try:
        raise ValueError("mine")
    except ValueError as error:
        log.error("Task exception was never retrieved", exc_info=error)
    log.error("future: <Task finished coro=<f() done, defined at /x/site-packages/orbax/checkpoint/a.py:126>>")
    assert [record.getMessage() for record in caplog.records] == ["Task exception was never retrieved"]


def test_a_job_that_fails_with_a_traceback_is_a_fault_of_it(tmp_path):
    process = Process(1, tmp_path / "log")
    for said, faults in (
        ("error: OSError: full\n", 0),
        ("error: OSError: full\nTraceback (most recent call last):\nValueError: x\n", 2),
    ):
        (tmp_path / "log.err").write_text(said)
        assert len(judged("sft", "full", [process], [1], 0)) == faults

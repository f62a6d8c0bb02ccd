"""Storage that is full, and odd surroundings: one line, nothing half-written, and the same command goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import _io, _signals
from jaxalign.evaluation import plots
from jaxalign.models.hf.files import whole_folder
from jaxalign.training import checkpoints, logging
from tests.test_damage import State
from train import world

ROOT = pathlib.Path(__file__).parent.parent


@contextlib.contextmanager
def most_bytes(count: int):
    """No file of this process may be longer in the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def folder_of(path: pathlib.Path) -> None:
    with whole_folder(path, overwrite=True) as temporary:
        (temporary / "weights").write_bytes(b"x" * 5000)


ROWS = [
    {"method": f"m{i}", "beta": 1.0, "gold": 0.1, "gold_95": 0.1, "kl": 1.0, "kl_kind": "exact", "responses": 2}
    for i in range(40)
]
WRITERS = {
    "JSON": lambda path: _io.write_own_json(path, ["x" * 5000]),
    "lines": lambda path: _io.write_lines(path, [["x" * 5000]], digest=True),
    "arrays": lambda path: _io.write_arrays(path, {"x": np.ones(5000)}),
    "a picture": lambda path: plots.frontier(ROWS, path),
    "a folder": folder_of,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_does_not_fit_is_not_there_and_what_was_there_stays(tmp_path, name):
    path, write = tmp_path / "x.png", WRITERS[name]
    write(path)
    before = sorted(p.name for p in tmp_path.iterdir())
    data = path.read_bytes() if path.is_file() else None
    with most_bytes(2000), pytest.raises(OSError, match=r"Errno 27|File too large"):
        write(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert data == (path.read_bytes() if path.is_file() else None)


@pytest.fixture
def in_a_job():
    """Of a failed save, what orbax was still writing is passed over, as in all jobs."""
    with _signals.handled():
        yield


@pytest.mark.usefixtures("in_a_job")
def test_a_checkpoint_that_does_not_fit_is_one_error_and_the_one_before_stays(tmp_path):
    state = lambda step: State(jnp.asarray(step), {"w": jnp.asarray(np.random.default_rng(step).normal(size=9000))})  # noqa: E731
    folder = tmp_path / "checkpoints"
    with checkpoints.opened(folder) as manager:
        checkpoints.save(manager, state(1), {"step": 1})

    def save_the_second():
        with most_bytes(3000), checkpoints.opened(folder) as manager:
            checkpoints.save(manager, state(2), {"step": 2})
            checkpoints.finish(manager)

    with pytest.raises(OSError, match=r"^checkpoints: expected to save in .*checkpoints, found .*; the last") as found:
        save_the_second()
    assert len(str(found.value).splitlines()) == 1
    with checkpoints.opened(folder) as manager:
        assert manager.latest_step() == 1
        assert checkpoints.restore(manager, state(0), {})[1] == 1
        checkpoints.save(manager, state(2), {"step": 2})
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


def test_a_folder_into_which_a_failed_save_still_writes_is_removed_when_it_is_done(tmp_path, monkeypatch):
    left, rmtree, late = tmp_path / "2.orbax-checkpoint-tmp", shutil.rmtree, [b"late"]
    left.mkdir()

    def remove(folder):
        if late:
            (folder / "state").write_bytes(late.pop())
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        rmtree(folder)

    monkeypatch.setattr(shutil, "rmtree", remove)
    with checkpoints.opened(tmp_path):
        assert not left.exists()


def test_a_line_of_metrics_that_was_cut_short_is_dropped(tmp_path):
    def write_many():
        with most_bytes(190), logging.MetricWriter(tmp_path, step=0, track="none") as writer:
            for step in range(1, 20):
                writer.write(step, {"loss": 1 / 3})

    with pytest.raises(OSError, match="File too large"):
        write_many()
    assert not (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    with logging.MetricWriter(tmp_path, step=3, track="none") as writer:
        writer.write(4, {"loss": 1.0})
    assert [line["step"] for line in logging.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


class Loud:
    """It is hung up on when it is deleted."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)


@pytest.mark.usefixtures("default_signals")
def test_a_signal_that_would_come_again_does_not_once_its_block_has_ended():
    """A computation that processes share may fail meanwhile, since the other process has ended."""
    came = []
    signal.signal(signal.SIGHUP, lambda *_: came.append(True))

    def leave():
        with _signals.handled():
            one = Loud()
            del one
            raise ValueError("Gloo")

    for _ in range(2):
        with pytest.raises(ValueError, match="Gloo"):
            leave()
    time.sleep(0.3)
    assert came == []


@pytest.mark.usefixtures("default_signals")
def test_a_signal_that_comes_where_no_error_gets_through_comes_again():
    with pytest.raises(_signals.Stopped) as found, _signals.handled():  # noqa: PT012
        one = Loud()
        del one
        time.sleep(5)
    assert found.value.code == 129
    assert not _signals.asked()
    with pytest.raises(KeyboardInterrupt), _signals.deferred():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert _signals.asked()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_signals")
def test_signals_that_are_ignored_stay_so_but_for_term():
    """As nohup has HUP ignored, and a shell's background Ctrl-C."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
        with _signals.handled():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert not _signals.asked()
        assert signal.getsignal(number) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(_signals.Stopped) as found, _signals.handled():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert found.value.code == 143


AT_ONCE = """
import os, signal, sys, time
from jaxalign import _signals
with _signals.deferred():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    print("saved")
"""
AT_START = """
import os, signal, sys
sys.argv = ["-m"]
import train
os.kill(os.getpid(), signal.{name})
"""


AT_THE_END = """
import atexit, os, signal, time
from jaxalign import commands
atexit.register(time.sleep, 0.01)  # the handler of Python runs here
atexit.register(os.kill, os.getpid(), signal.SIGINT)
commands.execute(lambda words: None, [])
"""


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(
    ("program", "code", "told"),
    [
        (AT_THE_END, -signal.SIGINT, ""),
        (AT_ONCE, 130, "\nstopping: what is at hand is saved first; a second Ctrl-C ends at once\n"),
        (AT_START.format(name="SIGTERM"), 143, "stopped by SIGTERM before anything was done; the same command begins"),
        (AT_START.format(name="SIGINT"), 130, "interrupted before anything was done; the same command begins again\n"),
    ],
)
def test_a_second_interrupt_and_one_before_a_job_begins_end_at_once(program, code, told):
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == code
    assert found.stderr.startswith(told)
    assert found.stdout == ""
    assert "Traceback" not in found.stderr


@pytest.mark.usefixtures("default_signals")
def test_a_signal_while_options_are_read_is_no_error_of_theirs(capsys, monkeypatch):
    import tyro

    from jaxalign import commands

    def cli(*args, **options):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(1)

    monkeypatch.setattr(tyro, "cli", cli)
    with pytest.raises(SystemExit) as found:
        commands.execute(world.main, ["--out", "x"])
    assert found.value.code == 129
    assert capsys.readouterr().err == "stopped by SIGHUP; the same command goes on from what is saved\n"


class Full:
    """A stream that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        self.write("")


def test_the_exit_code_of_a_stop_can_be_chosen(capsys, monkeypatch):
    from jaxalign import commands

    def main(words):
        assert words == ["a", "b"]
        os.kill(os.getpid(), signal.SIGTERM)
        _signals.check()

    for extra, code in ((["--stopped-code", "0"], 0), (["--stopped-code=75"], 75), ([], 143)):
        with pytest.raises(SystemExit) as found:
            commands.execute(main, ["a", *extra, "b"])
        assert found.value.code == code
        assert capsys.readouterr().err == "stopped by SIGTERM; the same command goes on from what is saved\n"
    with monkeypatch.context() as patch:  # where nothing can be said
        patch.setattr(sys, "stderr", Full())
        with pytest.raises(SystemExit) as found:
            commands.execute(lambda _: 1 / 0, [])
    assert found.value.code == 1
    for wrong in (["--stopped-code"], ["--stopped-code", "x"], ["--stopped-code", "256"]):
        with pytest.raises(SystemExit) as found:
            commands.execute(main, wrong)
        assert found.value.code == 2
        assert "stopped-code: expected an exit code" in capsys.readouterr().err


def test_a_job_runs_without_home_locale_stdout_and_with_odd_names_in_another_folder(tmp_path):
    folder = tmp_path / "runs – 走る ü"
    world.run(world.Config(out=str(folder / "wörld"), texts=24, pairs=5, held_out=2, layers=1, width=8))
    (tmp_path / "elsewhere").mkdir()
    given = {"data": "texts.jsonl", "architecture": "config.json", "tokenizer": "tokenizer"}
    words = [w for name, file in given.items() for w in (f"--{name}", str(folder / "wörld" / file))]
    words += [
        "--max-length",
        "32",
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--validation",
        "0",
        "--out",
        str(folder / "s t"),
    ]
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "LANG", "LANGUAGE", "XDG_CACHE_HOME")}
    env = {k: v for k, v in kept.items() if not k.startswith("LC_")} | {"LANG": "C", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxalign", "sft", *words]
    options: dict = {"cwd": tmp_path / "elsewhere", "env": env, "stderr": subprocess.PIPE, "text": True, "check": False}
    found = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], **options)
    assert found.returncode == 0, found.stderr
    assert (folder / "s t/model/model.safetensors").exists()
    assert (folder / "s t/summary.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    with open("/dev/full", "w") as full:  # the finished run is told where nothing can be told
        found = subprocess.run(command, stdout=full, **options)
    assert found.returncode == 1
    assert [line for line in found.stderr.splitlines() if "compilation" not in line] == [
        "error: OSError: [Errno 28] No space left on device (--debug shows the traceback)"
    ]

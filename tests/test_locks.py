"""Locks that hold anything: they are told in one line, or taken over once nobody has renewed them."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import time

import pytest

from jaxalign import _locks, _runs
from tests.test_run_folders import config, lock

ODD = {
    "no text": b"\xff\xfe",
    "empty": b"",
    "a list": b"[1]",
    "deep": b"[" * 100_000,
    "a long number": b'{"pid": ' + b"1" * 5000 + b"}",
}
CHANGES = [
    {"time": "yesterday"},
    {"time": 1e300},
    {"time": 10**400},
    {"time": -(10**400)},
    {"time": None},
    {"time": [1]},
    {"started": "x"},
    {"started": [1]},
    {"host": ["x"]},
    {"host": "x" * 5000},
    {"host": "two\nlines"},
]
FOREIGN = [{"pid": 0}, {"pid": -1}, {"pid": 10**40}, {"pid": True}, {"pid": "x"}, {"pid": None}]


def refused(out: pathlib.Path) -> None:
    with pytest.raises(
        ValueError, match=r"^out: expected a folder that no other job writes to, found .* in use"
    ) as found:
        _runs.open_run(out, config(out))
    assert str(out / ".lock") in str(found.value)
    assert len(str(found.value)) < 1000
    assert "\n" not in str(found.value)


def silent(out: pathlib.Path, seconds: float = 900) -> None:
    os.utime(out / ".lock", (time.time() - seconds, time.time() - seconds))


@pytest.mark.parametrize("name", ODD)
def test_a_lock_without_a_process_is_told_and_taken_over_when_it_is_silent(tmp_path, capsys, name):
    out = lock(tmp_path / "run")
    (out / ".lock").write_bytes(ODD[name])
    refused(out)
    silent(out)
    with _locks.released():
        _runs.open_run(out, config(out))
        assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
    assert "the lock of a process that is not named, which is gone, is passed over" in capsys.readouterr().err
    assert not list(out.glob(".lock*"))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change)[:20])
def test_a_lock_with_an_odd_field_is_told(tmp_path, change):
    refused(lock(tmp_path / "run", **change))
    refused(lock(tmp_path / "other", **{"host": "another", **change}))


@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: str(change)[:20])
def test_a_lock_whose_number_is_of_no_process_counts_as_unnamed(tmp_path, change):
    out = lock(tmp_path / "run", started=None, **change)
    refused(out)
    silent(out)
    with _locks.released():
        _runs.open_run(out, config(out))


def test_a_lock_of_the_future_is_taken_over_once_nobody_has_renewed_it(tmp_path):
    out = lock(tmp_path / "run", host="another")
    silent(out, -9000)
    refused(out)
    assert abs((out / ".lock").stat().st_mtime - time.time()) < 60  # from now on its silence counts
    silent(out, -9000)  # its process is there, and has another clock
    refused(out)
    silent(out)
    with _locks.released():
        _runs.open_run(out, config(out))
    assert not (out / ".lock").exists()


def test_a_lock_that_was_overwritten_is_no_error_when_it_is_given_back(tmp_path):
    out = tmp_path / "run"
    with _locks.released():
        _locks.take(out)
        (out / ".lock").write_bytes(b"\xff\xfe")
    assert (out / ".lock").read_bytes() == b"\xff\xfe"


def test_a_folder_in_the_place_of_a_lock_is_told(tmp_path):
    out = tmp_path / "run"
    (out / ".lock").mkdir(parents=True)
    refused(out)
    assert _locks.in_use(out)


def test_the_lock_of_this_machine_holds_its_name(tmp_path):
    with _locks.released():
        _locks.take(tmp_path)
        assert json.loads((tmp_path / ".lock").read_text())["host"] == socket.gethostname()

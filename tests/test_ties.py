"""Connections between the processes of one run: who may join, and what a signal that came elsewhere does. Processes
that are killed are in `tests.kill_jobs`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from typing import NamedTuple

import jax
import pytest

from jaxalign import _hosts, _signals, _ties, commands, training
from jaxalign.launch import processes
from tests.test_hosts import end, start, told_by


@pytest.fixture
def first_of_two(monkeypatch):
    """This process as the first of two, without connections."""
    monkeypatch.setattr(_hosts, "count", lambda: 2)
    monkeypatch.setattr(_hosts, "index", lambda: 0)
    yield monkeypatch
    for link in _ties._links.values():
        link.close()
    _ties._links.clear()


def line_to(port: int, line: str) -> socket.socket:
    link = socket.create_connection(("localhost", port), timeout=5)
    link.sendall(line.encode())
    return link


def test_only_the_processes_of_the_run_are_connected(first_of_two):
    listener = _ties._listener()
    port = listener.getsockname()[1]
    wrong = ["other 1\n", "token 0\n", "token 2\n", "token x\n", "token\n", "t" * 200, "\n"]
    strangers = [line_to(port, line) for line in wrong]
    own = line_to(port, "token 1\nbye\n")
    _ties._accept(listener, "token")
    assert list(_ties._links) == [1]
    for link in strangers:
        with contextlib.suppress(ConnectionResetError):  # what it said after the line is not read
            assert link.recv(1) == b""
    assert _ties._links[1].recv(4) == b"bye\n"
    assert _ties._links[1].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    for link in (own, *strangers):
        link.close()


@pytest.mark.parametrize("index", [0, 1])
def test_processes_without_a_way_to_the_first_are_told_of_and_go_on(index, first_of_two, capsys):
    first_of_two.setattr(_hosts, "index", lambda: index)
    first_of_two.setattr(_ties, "JOIN", 0.05)
    nowhere = {"token": "t", "port": 1, "name": "localhost"}
    first_of_two.setattr(_hosts, "from_first", lambda text: text if index == 0 else json.dumps(nowhere))
    first_of_two.setattr(_hosts, "gather_texts", lambda text: [text, ""])
    _ties.join("localhost:1")
    assert not _ties._links
    told = "note: processes: expected that each can connect to process 0, found one that cannot; a signal ends only"
    assert capsys.readouterr().err.startswith(told) == (index == 0)
    assert _ties.gone(5.0) == ""
    _ties.claim()  # nobody else can


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_of_another_process_ends_this_one_as_its_own_would(number, code, monkeypatch):
    passed_on: list[int] = []
    monkeypatch.setitem(_ties._stop, "number", 0)
    monkeypatch.setattr(_signals, "told", [passed_on.append])
    with pytest.raises((_signals.Stopped, KeyboardInterrupt)) as found, _signals.handled():  # noqa: PT012
        threading.Thread(target=_ties._hear, args=(1, "stop", str(int(number)))).start()
        time.sleep(5)
    assert _signals.words_of(found.value)[0] == code - 128
    assert passed_on == []
    _signals.ask(signal.SIGTERM)  # outside of a job it is left alone
    with pytest.raises(_signals.Stopped), _signals.handled():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert passed_on == [signal.SIGTERM]


def test_a_flag_of_one_process_needs_no_other():
    assert [_hosts.begin_any(flag)() for flag in (False, True)] == [False, True]


class Counter(NamedTuple):
    """A state that counts its steps."""

    step: jax.Array


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("own", [0, signal.SIGHUP])
def test_processes_that_train_stop_after_the_step_at_which_all_know_of_the_signal(own, first_of_two):
    """A flag that is summed at one step is read at the next: by then the answer is there, and it is the same in all."""
    flags, read = [], []

    def begin_any(flag: bool):
        flags.append(flag)
        answer = any(flags) or len(flags) > 3  # of the other process, later
        return lambda: (read.append(len(flags)), answer)[1]

    def step(state, batch, frozen):
        if own and len(flags) == 1:
            os.kill(os.getpid(), own)
            time.sleep(0.01)
        return Counter(state.step + 1), {"loss": jax.numpy.zeros(())}

    first_of_two.setattr(_hosts, "begin_any", begin_any)
    with pytest.raises(_signals.Stopped) as found:
        training.fit(step, Counter(jax.numpy.asarray(0)), lambda _: iter([{}] * 9), steps=9, track="none")
    assert found.value.told
    assert found.value.code == 128 + (own or signal.SIGTERM)
    assert flags == ([False, True, True] if own else [False] * 5)
    assert read == list(range(2, len(flags) + 1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (0, 1)])
def test_a_shared_computation_that_fails_after_a_signal_ends_as_the_signal_does(number, code, monkeypatch, capsys):
    """The other process has ended first, of the same signal."""
    ended = []

    def end(code: int):
        ended.append(code)
        raise SystemExit(code)

    for name, value in {"label": lambda: "process 0 of 2: ", "claim": lambda: None, "gone": lambda: ""}.items():
        monkeypatch.setattr(processes, name, value)
    monkeypatch.setattr(processes, "start", lambda *_, **__: None)
    monkeypatch.setattr(processes, "end", end)
    monkeypatch.setitem(_ties._stop, "number", number)

    def job(_):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    with pytest.raises(SystemExit):
        commands.execute(job, [])
    assert ended == [code]
    assert ("Gloo" in capsys.readouterr().err) == (number == 0)


def waiting(folder, busy, other):
    words = ["tests.waiting_program", str(folder), str(busy), other]
    return start([*words, "--coordinator", "COORDINATOR", "--num-processes", "2", "--process-id", "PROCESS"])


def at_work(folder):
    """Until one of them works and the other waits."""
    until = time.monotonic() + 100
    while {path.name for path in folder.iterdir()} != {"0", "1"} and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)


@pytest.mark.parametrize(
    ("busy", "other", "victim", "number", "codes"),
    [
        (0, "done", 0, signal.SIGTERM, (143, 143)),
        (1, "done", 1, signal.SIGTERM, (143, 143)),
        (0, "shared", 0, signal.SIGTERM, (143, 143)),
        (0, "done", 1, signal.SIGKILL, (1, -9)),
        (1, "done", 0, signal.SIGTERM, (143, 143)),
    ],
)
def test_processes_end_together_whatever_each_is_at(busy, other, victim, number, codes, tmp_path):
    """One is done, or waits for the other in a shared computation, which is still at work when the signal comes."""
    running = waiting(tmp_path, busy, other)
    try:
        at_work(tmp_path)
        running[victim].send_signal(number)
        told = told_by(running, timeout=_ties.LINGER - 5)
    finally:
        end(running)
    assert tuple(process.returncode for process in running) == codes
    for text, code in zip(told, codes, strict=True):
        lines = [line for line in text.splitlines() if line and "[Gloo]" not in line]
        if code != -9:
            assert len(lines) == 1, text
            assert ("stopped by " if code > 128 else f"process {victim} is gone") in lines[0]


def test_signals_that_a_scheduler_sends_to_all_processes_again_and_again_end_them_once(tmp_path):
    """The end of processes that wait for each other takes seconds."""
    running = waiting(tmp_path, 0, "done")
    try:
        at_work(tmp_path)
        for _ in range(8):
            for process in running:
                process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        told = told_by(running, timeout=_ties.LINGER - 5)
    finally:
        end(running)
    assert tuple(process.returncode for process in running) == (143, 143)
    for text in told:
        assert [line for line in text.splitlines() if line and "[Gloo]" not in line] == [
            "stopped by SIGTERM; the same command goes on from what is saved"
        ]

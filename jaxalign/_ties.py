"""Connections between the processes of one run, beside those of jax: a signal to one of them reaches all, and one that
is gone ends the others, which would wait for it in the next computation that they share.

Process 0 listens, each other one is connected to it, and lines go over these connections:

    stop N   a signal with that number has come
    ends N   the process that says it ends with that exit code, and tells why itself
    gone I   process I is gone
    bye      the process that says it is done; process 0 says it when all are

The end of a connection before process 0 has said so, and without `ends`, is a process that was killed. It is seen at
once; that of a machine without power or network by the kernel's own probes, in about a minute.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import NoReturn

import jax

from jaxalign import _hosts, _locks, _signals

JOIN = 20.0
"""Seconds in which the processes have to be connected."""

GRACE, SAVING = 3.0, 20.0
"""Seconds in which a process tells why it ends itself, once another has said that it ends; and after a signal that it
answers where it can save."""

LINGER = SAVING + 10.0
"""Seconds for which process 0 waits for the others to end, which takes them less: jax aborts those that it leaves."""

PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""When the kernel asks whether a silent machine is still there [s, s, times]."""

_links: dict[int, socket.socket] = {}  # process -> connection to it
_ended: set[int] = set()  # processes whose connection has ended
_done: set[int] = set()  # processes that have said that they are done
_silent: set[int] = set()  # processes whose end is no loss: all are done, or they tell by themselves why they end
_claim = threading.Lock()  # held by whoever tells why this process ends
_seen = threading.Event()  # a process is gone
_found: dict[str, str] = {}  # "gone" -> the words about that process
_stop: dict[str, int | None] = {"number": 0, "code": None}  # the first signal; the exit code after it that was chosen


def join(coordinator: str | None) -> None:
    """Connects the processes, all of which have to call it once jax.distributed is there. Where they cannot reach each
    other a note says so, and nothing else changes.

    Args:
      coordinator: HOST:PORT of process 0; None where jax has found it out.
    """
    token, listener = secrets.token_hex(16), None
    if _hosts.is_first():
        with contextlib.suppress(OSError):
            listener = _listener()
    port = 0 if listener is None else listener.getsockname()[1]
    first = json.loads(_hosts.from_first(json.dumps({"token": token, "port": port, "name": socket.gethostname()})))
    with contextlib.suppress(OSError):
        if listener is not None:
            _accept(listener, token)
        elif first["port"]:
            own = [coordinator.rpartition(":")[0].strip("[]")] if coordinator else []
            _links[0] = _connected([*own, first["name"]], first["port"], first["token"])
    whole = len(_links) == (_hosts.count() - 1 if _hosts.is_first() else 1)
    if not all(_hosts.gather_texts("joined" if whole else "")):
        for link in _links.values():
            link.close()
        _links.clear()
        if _hosts.is_first():
            print(
                "note: processes: expected that each can connect to process 0, found one that cannot; a signal ends "
                "only the process that gets it, and a process that is gone is noticed by jax, in minutes",
                file=sys.stderr,
            )
        return
    _signals.told.append(_pass_on)
    atexit.register(leave)
    for other, link in _links.items():
        threading.Thread(target=_listen, args=(other, link), name=f"tie-{other}", daemon=True).start()


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(listener: socket.socket, token: str) -> None:
    """Takes the connections of the other processes, which know the token."""
    until = time.monotonic() + JOIN
    with listener:
        while len(_links) < _hosts.count() - 1 and (left := until - time.monotonic()) > 0:
            listener.settimeout(left)
            link, _ = listener.accept()
            link.settimeout(5.0)
            with contextlib.suppress(OSError, ValueError):
                key, _, number = _line(link).partition(" ")
                if hmac.compare_digest(key.encode(), token.encode()) and int(number) in range(1, _hosts.count()):
                    _links[int(number)] = _kept(link)
                    continue
            link.close()


def _line(link: socket.socket) -> str:
    """A line of at most a hundred bytes."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 100 and (part := link.recv(1)):
        data += part
    return data.decode(errors="replace").strip()


def _connected(names: list[str], port: int, token: str) -> socket.socket:
    """A connection to process 0, under the first of its names that leads there."""
    for name in dict.fromkeys(names):
        with contextlib.suppress(OSError):
            link = socket.create_connection((name, port), timeout=5.0)
            link.sendall(f"{token} {_hosts.index()}\n".encode())
            return _kept(link)
    raise ConnectionError(f"no way to process 0 by {names}")


def _kept(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def _send(line: str, *, but: int | None = None) -> None:
    """Tells all processes that this one is connected to, but one."""
    for other, link in list(_links.items()):
        if other != but and other not in _ended:
            with contextlib.suppress(OSError):
                link.sendall(f"{line}\n".encode())


def _pass_on(number: int) -> None:
    """Tells the others of a signal to this process."""
    _stop["number"] = number
    _send(f"stop {number}")


def _listen(other: int, link: socket.socket) -> None:
    """Hears what a process says, until its connection ends."""
    with contextlib.suppress(OSError, ValueError), link.makefile("r", encoding="ascii") as lines:
        for line in lines:
            _hear(other, *line.split())
    _ended.add(other)
    if other not in _silent:
        _lose(other, told=False)


def _hear(other: int, word: str, number: str = "0") -> None:
    if word == "stop":
        _stop["number"] = _stop["number"] or int(number)  # kept: the main thread may be in a computation
        _send(f"stop {number}", but=other)
        _signals.ask(int(number))
    elif word == "gone":
        _lose(int(number), told=False)
    elif word == "bye":
        _done.add(other)
        if other == 0:  # then all are
            _silent.add(other)
    elif word == "ends":
        _silent.add(other)
        # Where it cannot save, what keeps this process from its end is a computation that waits for the other, or one
        # that is compiled.
        seconds = SAVING if _stop["number"] and _signals.deferring() else GRACE
        late = threading.Timer(seconds, _lose, (other,), {"told": True})
        late.daemon = True
        late.start()


def _lose(other: int, *, told: bool) -> None:
    """Ends this process because another has ended."""
    why = "has ended, and says itself why" if told else "is gone: it was killed, or its machine does not answer"
    _found["gone"] = f"process {other} {why}; the same command goes on from what is saved"
    _seen.set()
    if _hosts.is_first():
        _send(f"gone {other}", but=other)
    if _claim.acquire(blocking=False):
        number, code = _stop["number"], _stop["code"]
        words = _signals.words(number) if number else f"error: {_hosts.label()}{_found['gone']}"
        with contextlib.suppress(OSError, ValueError):
            print(words, file=sys.stderr, flush=True)
        end(_signals.code_of(number, code) if number else 1, seconds=0.0)


def stopped() -> int:
    """The number of the first signal to any of the processes; 0 where none has come."""
    return _stop["number"] or 0


def choose_code(code: int | None) -> None:
    """Sets the exit code after a signal; None: 128 and its number."""
    _stop["code"] = code


def claim() -> None:
    """Called before this process tells why it ends: it waits here for its end where that is told already."""
    if _links:
        _claim.acquire()


def gone(seconds: float = 1.0) -> str:
    """What there is to say about a process that is gone; "" where none is within so many seconds. A computation that is
    shared fails as well then, in words that do not say whose fault it is."""
    return _found["gone"] if _links and _seen.wait(seconds) else ""


def leave() -> None:
    """Says that this process is done, whatever the others do."""
    _silent.update(_links)
    _send("bye")


def leave_together() -> None:
    """Says that this process is done, and waits until all are: jax, which waits for the others at a process's end as
    well, aborts all of them after five minutes of that. A process that is killed meanwhile ends the others."""
    if not _links:
        return
    if not _hosts.is_first():
        _send("bye")
    while set(_links) - _done - _ended:
        time.sleep(0.02)
    if _hosts.is_first():
        leave()
    # jax's processes wait for each other here and not at the interpreter's end, where a signal would end one of them at
    # once, and jax abort the others.
    jax.distributed.shutdown()


def end(code: int, *, seconds: float = 1.0) -> NoReturn:
    """Ends a process of several at once. The others have a moment for their own line: jax ends those that wait for this
    one, or wait for it at its end. Process 0 is the last.

    Args:
      code: the exit code.
      seconds: of that moment.
    """
    _send(f"ends {code}")
    _silent.update(_links)
    _locks.release_all()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    time.sleep(seconds)
    until = time.monotonic() + LINGER
    while _hosts.is_first() and set(_links) - _ended and time.monotonic() < until:
        time.sleep(0.02)
    os._exit(code)

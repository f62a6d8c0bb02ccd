"""One job at a time in a run folder: a file that names the process, and is taken over once that process is gone."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

NAME = ".lock"
BEAT, SILENT = 20.0, 300.0
"""Seconds between two touches of a lock that is held, and after which one of another machine counts as left behind."""

MOST = 2**31
"""More than any number of a process."""

_held: dict[pathlib.Path, str] = {}  # lock -> what it holds
_beating: list[threading.Thread] = []


def take(folder: pathlib.Path) -> str:
    """Takes the lock of a folder, which is made where it does not exist; this process may take it again.

    A lock is left behind where its process is gone: on this machine by its number and the time at which it started, on
    another by a lock that has not been touched for `SILENT` seconds.

    Args:
      folder: the run folder.

    Returns:
      What was taken over, for a message: "" where there was no lock.

    Raises:
      ValueError: another process has it, which is named.
    """
    path = folder.resolve() / NAME
    if path in _held:
        return ""
    made = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    now = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "time": round(time.time()),
    }
    text, passed = json.dumps(now | {"made": len(made)}) + "\n", ""
    for _ in range(3):
        if _create(path, text):
            _held[path] = text
            _beat()
            return passed
        found = _read(path)
        if found is None:
            continue  # gone in the meantime
        if not _left_behind(path, found):
            break
        aside = path.with_name(f"{NAME}.{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
            if _read(aside) != found:  # another process was faster, and this is its lock
                with contextlib.suppress(OSError):
                    os.link(aside, path)
            aside.unlink()
        passed = f"the lock of {_owner(found)}, which is gone"
    raise ValueError(
        f"out: expected a folder that no other job writes to, found {folder} in use by {_owner(_read(path) or '')}; "
        f"wait for it or name another --out (where that process is surely gone: remove {path})"
    )


def release(folder: pathlib.Path) -> None:
    """Gives the lock of a folder back, and removes the folder, with those that `take` made around it, if empty."""
    path = folder.resolve() / NAME
    text = _held.pop(path, None)
    if text is None:
        return
    with contextlib.suppress(OSError):
        if _read(path) == text:
            path.unlink()
        place = path.parent
        for _ in range(json.loads(text)["made"]):
            place.rmdir()
            place = place.parent


def release_all() -> None:
    """Gives back all locks of this process."""
    for path in list(_held):
        release(path.parent)


def clear(folder: pathlib.Path) -> None:
    """Removes a lock that was left behind in a folder that nobody writes to any more, where that is allowed."""
    path = folder.resolve() / NAME
    with contextlib.suppress(OSError):
        text = _read(path)
        if text is not None and path not in _held and _left_behind(path, text):
            path.unlink()


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Gives back at the end of the block what was taken in it."""
    before = set(_held)
    try:
        yield
    finally:
        for path in set(_held) - before:
            release(path.parent)


def held(folder: pathlib.Path) -> bool:
    """Whether this process has the lock of a folder."""
    return folder.resolve() / NAME in _held


def in_use(folder: pathlib.Path) -> bool:
    """Whether a process has the lock of a folder, this one or another that is not gone."""
    path = folder.resolve() / NAME
    text = _read(path)
    try:
        return path.exists() if text is None else path in _held or not _left_behind(path, text)
    except OSError:  # a folder in which nothing can be tried
        return True


def started(pid: int) -> int | None:
    """When a process started, in its machine's own count; None where that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def is_gone(pid: int, since: int | None) -> bool:
    """Whether a process of this machine, which started then, is no more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return since is not None and started(pid) != since


def _create(path: pathlib.Path, text: str) -> bool:
    """Makes the lock with its text at once; False where there is one."""
    own = path.with_name(f"{NAME}.{uuid.uuid4().hex[:8]}")
    own.write_text(text)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x") as sink:
                sink.write(text)
        except FileExistsError:
            return False
    finally:
        own.unlink()
    return True


def _read(path: pathlib.Path) -> str | None:
    """What a lock holds, whatever that is; None where there is none, or none that can be read."""
    try:
        return path.read_text(encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None


def _values(text: str) -> dict[str, Any]:
    """The fields of a lock; {} where it names no process."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict) and type(found.get("pid")) is int and 0 < found["pid"] < MOST:
            return found
    return {}


def _owner(text: str) -> str:
    found = _values(text)
    if not found:
        return "a process that is not named"
    host = " ".join(str(found.get("host")).split())[:100]
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["time"]))
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        since = "a time that is not known"
    return f"process {found['pid']} on {host} since {since}"


def _left_behind(path: pathlib.Path, text: str) -> bool:
    found = _values(text)
    if found.get("host") == socket.gethostname():
        since = found.get("started")
        return is_gone(found["pid"], since if type(since) is int else None)
    # By the clock of the file system: that of the other machine may be off.
    probe = path.with_name(f"{NAME}.{uuid.uuid4().hex[:8]}")
    probe.touch()
    try:
        age = probe.stat().st_mtime - path.stat().st_mtime
        if age < 0:  # of the future: it is silent from now on, unless its process renews it
            with contextlib.suppress(OSError):
                os.utime(path)
        return age > SILENT
    except FileNotFoundError:
        return False
    finally:
        probe.unlink()


def _beat() -> None:
    """Starts the thread that touches the locks."""

    def touch() -> None:
        while True:
            time.sleep(BEAT)
            for path in list(_held):
                with contextlib.suppress(OSError):
                    os.utime(path)

    if not _beating:
        _beating.append(threading.Thread(target=touch, name="locks", daemon=True))
        _beating[0].start()


def _at_exit(pid: int) -> None:
    if os.getpid() == pid:  # not a fork of the process
        release_all()


atexit.register(_at_exit, os.getpid())

"""The places at which jobs are killed, and processes of their own that do them (`tests.killed_jobs` has the jobs)."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import random
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.killed_jobs import Job

PLACES = ("start", "random", "checkpoint", "file", "partial", "model", "summary", "full", "TERM", "INT", "HUP")
"""Where a job is killed."""

HUNG = 99
"""Stands for the exit code of a process that did not end."""

PROMISED = {"TERM": 143, "INT": 130, "HUP": 129}
"""Signal that asks to end -> the exit code after it."""


# A job in a process of its own ----------------------------------------------------------------------------------------


class Process(NamedTuple):
    """A process that does a job, or one of several."""

    pid: int
    """Its number."""
    log: pathlib.Path
    """Its streams go to this path with .out and .err."""

    def told(self) -> str:
        """What it has written to stderr."""
        return self.log.with_suffix(".err").read_text(errors="replace")


def begin(
    job: Job, words: list[str], log: pathlib.Path, arm: Callable[[], None] = lambda: None, *, victim: int = 0
) -> list[Process]:
    """Starts the processes of a job.

    Args:
      job: which.
      words: its options.
      log: of the streams; of several processes the number of each follows.
      arm: called first in one of them, to have it killed.
      victim: which that is.

    Returns:
      The processes.
    """
    if job.processes == 1:
        return [_forked(job, words, log, arm)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = ["--coordinator", address, "--num-processes", str(job.processes), "--process-id"]
    return [
        _forked(
            job, [*words, *together, str(i)], log.with_name(f"{log.name}-{i}"), arm if i == victim else lambda: None
        )
        for i in range(job.processes)
    ]


def _forked(job: Job, words: list[str], log: pathlib.Path, arm: Callable[[], None]) -> Process:
    """A fork of this process that does a job."""
    pid = os.fork()
    if pid:
        return Process(pid, log)
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this runs in the background,
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or under nohup
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.argv = ["-m"]
        module = __import__(job.module, fromlist=["main"])
        from jaxalign import commands

        arm()
        commands.execute(module.main, words)
    except SystemExit as end:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(70)


def end(running: list[Process], *, seconds: float = 300.0, after_first: float = float("inf")) -> list[int]:
    """The exit code of each process, minus the signal that killed it. What still runs after so many seconds, or so many
    after the first of them has ended, is killed, and its code is `HUNG`."""
    codes: list[int | None] = [None] * len(running)
    until = time.monotonic() + seconds
    while None in codes:
        for i, process in enumerate(running):
            if codes[i] is None and (found := os.waitpid(process.pid, os.WNOHANG))[0]:
                codes[i] = -os.WTERMSIG(found[1]) if os.WIFSIGNALED(found[1]) else os.WEXITSTATUS(found[1])
                until = min(until, time.monotonic() + after_first)
            elif codes[i] is None and time.monotonic() > until:
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
                codes[i] = HUNG
        time.sleep(0.01)
    return [HUNG if code is None else code for code in codes]


# Kills ----------------------------------------------------------------------------------------------------------------


def die() -> None:
    """Kills this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(
    owner: Any, name: str, number: int, *, after: bool = False, when: Callable[..., bool] | None = None
) -> None:
    """Kills the process at the call of a function with that number, before it or after."""
    inner, seen = getattr(owner, name), [0]

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        seen[0] += when is None or when(*args, **kwargs)
        now = seen[0] == number and (when is None or when(*args, **kwargs))
        if now and not after:
            die()
        found = inner(*args, **kwargs)
        if now:
            die()
        return found

    setattr(owner, name, outer)


def drawn(rng: random.Random, most: int, reach: float) -> int:
    """A number of 1 to a share of the most."""
    return rng.randint(1, max(round(most * reach), 1))


def in_file(rng: random.Random, reach: float) -> None:
    """Kills the process inside a file's write: when it is open, half written, written, synced or renamed. Where a job
    keeps its best parameters, that is as often right after one of its best.json."""
    from jaxalign import _io

    number, stage, inner, seen = drawn(rng, 12, reach), rng.randrange(4), _io.whole_file, [0, 0]
    best = drawn(rng, 4, reach) if rng.random() < 0.5 else 0

    @contextlib.contextmanager
    def outer(path: pathlib.Path) -> Iterator[Any]:
        seen[0] += 1
        mine = seen[0] == number
        with inner(path) as sink:
            if mine and stage == 0:
                die()
            yield sink
            if mine and stage == 1:
                sink.flush()
                os.truncate(sink.fileno(), sink.tell() // 2)
                die()
            if mine and stage == 2:
                sink.flush()
                die()
        seen[1] += path.name == "best.json"
        if mine or (best and seen[1] == best):
            die()

    _io.whole_file = outer


def in_partial(rng: random.Random, reach: float) -> None:
    """Kills the process inside a batch of a partial file: some lines are there, and a half."""
    number, inner, seen = drawn(rng, 4, reach), pathlib.Path.open, [0]

    def outer(self: pathlib.Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        sink = inner(self, mode, *args, **kwargs)
        if mode == "a" and ".partial" in self.name:
            whole = sink.writelines

            def half(lines: Any) -> None:
                seen[0] += 1
                text = "".join(lines)
                if seen[0] == number:
                    sink.write(text[: rng.randrange(len(text))])
                    sink.flush()
                    die()
                whole([text])

            class Sink:
                writelines = staticmethod(half)
                flush = staticmethod(sink.flush)

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    sink.close()

            return Sink()
        return sink

    pathlib.Path.open = outer  # type: ignore[method-assign]


def later(seconds: float, number: int) -> None:
    """Sends this process a signal after a while."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), number))
    timer.daemon = True
    timer.start()


def arming(place: str, seconds: float, seed: int, reach: float = 1.0, *, joined: bool = False) -> Callable[[], None]:
    """What has a process killed at a place.

    Args:
      place: one of `PLACES`.
      seconds: that the job takes.
      seed: of what is drawn.
      reach: share of the job, from its begin, in which the moment is drawn.
      joined: the job's begin is when its processes have joined: until then jax waits for all, for minutes.
    """

    def arm() -> None:
        rng = random.Random(seed)
        from jaxalign import _io, _ties
        from jaxalign.models.hf import writing
        from jaxalign.training import checkpoints

        def some_time(share: float, number: int) -> None:
            when = rng.random() * share * reach * seconds
            if not joined:
                later(when, number)
                return
            join = _ties.join
            _ties.join = lambda *args: (join(*args), later(when, number))[0]

        if place in ("start", "random"):
            some_time(0.3 if place == "start" else 1.0, signal.SIGKILL)
        elif place in PROMISED:
            some_time(1.0, getattr(signal, f"SIG{place}"))
        elif place == "checkpoint":
            name = rng.choice(("save", "_seal_written"))
            at_call(checkpoints, name, drawn(rng, 3, reach), after=rng.random() < 0.5)
            if name == "save" and rng.random() < 0.5:  # some time into it
                inner = checkpoints.save
                checkpoints.save = lambda *args: (later(rng.random() * 0.05, signal.SIGKILL), inner(*args))[1]
        elif place == "file":
            in_file(rng, reach)
        elif place == "partial":
            in_partial(rng, reach)
        elif place == "model":
            at_call(writing, "_write_file", 1, after=rng.random() < 0.5)
        elif place == "summary":
            at_call(_io, "write_own_json", 1, when=lambda path, values: path.name == "summary.json")
        elif place == "full":
            size = int(2 ** rng.uniform(11, 11 + 4 * reach))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            if rng.random() < 0.3:
                some_time(1.0, signal.SIGKILL)

    return arm

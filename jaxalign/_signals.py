"""TERM, INT and HUP of all long jobs: the unit at hand is finished and saved, or dropped, and the process ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from jaxalign._words import take_word

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
AGAIN = b"\nstopping: what is at hand is saved first; a second Ctrl-C ends at once\n"

CLOSED = "Event loop is closed"
"""What parts of a checkpoint say that were still being written when its save failed, which is told."""

told: list[Callable[[int], None]] = []
"""Called with the number of the first signal, unless that came from another process of the same run (`ask`)."""

before_end: list[Callable[[], None]] = []
"""Called before a signal ends what runs, which may be a program that takes this for an error of its own."""

_sending: list[threading.Timer] = []
"""Signals that are about to be sent once more."""

_state: dict[str, int] = {"asked": 0, "deferring": 0, "other": 0}


class Stopped(SystemExit):
    """A signal other than Ctrl-C ended the run, which has saved: the exit code is 128 and the signal's number."""

    def __init__(self, number: int, *, told: bool = False):
        super().__init__(128 + number)
        self.number = number
        self.told = told
        """Whether a line has said how to go on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended the run, which has saved."""

    def __init__(self, *, told: bool = False):
        super().__init__()
        self.told = told
        """Whether a line has said how to go on."""


def at_start() -> None:
    """Has the signals end a job that `python -m` starts in one line, while its modules are imported."""
    if sys.argv[:1] == ["-m"]:  # so it is until the module is found
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _leave)


def _leave(number: int, _: Any) -> None:
    name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):
        os.write(2, f"{name} before anything was done; the same command begins again\n".encode())
    os._exit(128 + number)


@contextlib.contextmanager
def handled(*, last: bool = False) -> Iterator[None]:
    """Takes the signals in a block of the main thread. The first ends what runs with `Stopped` or `Interrupted`, at
    once or where a `deferred` block has saved; a second Ctrl-C ends the process at once. Blocks may lie in each
    other.

    Args:
      last: the process ends after the block (`ignore_rest`), or the signals are what they were.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is _note:
        yield
        return
    former, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook

    def lost(found: Any) -> None:
        if isinstance(found.exc_value, Stopped | Interrupted):
            _again()
        elif str(found.exc_value) != CLOSED:
            hook(found)

    _state["asked"], sys.unraisablehook = 0, lost
    for number, before in former.items():
        if before is not signal.SIG_IGN or number == signal.SIGTERM:  # nohup has HUP ignored
            signal.signal(number, _note)
    try:
        yield
    finally:
        while _sending:
            _sending.pop().cancel()
        if last:
            ignore_rest()
        else:
            for number, before in former.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)
        _state["asked"], sys.unraisablehook = 0, hook


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Has the signals that are taken end the process in one line, in a block that loads modules before anything is
    done: an error that a handler raises while a module in C is loaded may crash the process or get lost."""
    taken = [number for number in SIGNALS if signal.getsignal(number) is _note]
    for number in taken:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, _note)


def _again() -> None:
    """Sends the signal once more: it came where Python lets no error through, as in a destructor."""
    number, _state["asked"] = _state["asked"], 0
    timer = threading.Timer(0.1, _send_again, (number,))
    timer.daemon = True
    timer.start()
    _sending.append(timer)


def _send_again(number: int) -> None:
    if signal.getsignal(number) is _note:  # else the block has ended for another reason, and the signal with it
        os.kill(os.getpid(), number)


def ignore_rest() -> None:
    """Has TERM and HUP do nothing, and Ctrl-C end this process at once: it is about to end."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _leave_now if number == signal.SIGINT else signal.SIG_IGN)


def _leave_now(number: int, _: Any) -> None:
    os._exit(128 + number)


def at_end() -> None:
    """Has Ctrl-C end this process without a word once the interpreter is ending: the job is done."""
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def again() -> None:
    """Takes the signals back from what has set handlers of its own below Python's: jax.distributed takes TERM."""
    for number in SIGNALS:
        if signal.getsignal(number) is _note and threading.current_thread() is threading.main_thread():
            signal.signal(number, _note)


def ask(number: int) -> None:
    """Has a signal that came to another process of the same run end this one too. It may be called in any thread.

    Args:
      number: of the signal.
    """
    if not _state["asked"] and signal.getsignal(signal.SIGTERM) is _note:
        _state["other"] = number
        os.kill(os.getpid(), signal.SIGTERM)  # never INT, of which a second one ends at once


def _note(number: int, _: Any) -> None:
    other, _state["other"] = _state["other"], 0
    if _state["asked"]:
        if number == signal.SIGINT:
            os._exit(128 + number)
        return
    number = _state["asked"] = other or number
    if not other:
        for tell in told:
            tell(number)
    if not _state["deferring"]:
        for call in before_end:
            call()
        stop()
    if number == signal.SIGINT:
        with contextlib.suppress(OSError):
            os.write(2, AGAIN)


@contextlib.contextmanager
def deferred(*, on: bool = True) -> Iterator[None]:
    """A block that asks for signals (`asked`) where it can save, and is not ended elsewhere; they are taken in it.

    Args:
      on: False: the block is one like any other.
    """
    with handled():
        _state["deferring"] += on
        try:
            yield
        finally:
            _state["deferring"] -= on
        check()


def asked() -> int:
    """The number of the signal that has asked this process to end; 0 where none has."""
    return _state["asked"]


def deferring() -> bool:
    """Whether this process runs a block that answers a signal where it can save."""
    return _state["deferring"] > 0


def check() -> None:
    """Ends what runs where a signal has asked for it: one that came while Python could not raise is not lost."""
    if _state["asked"] and not _state["deferring"]:
        stop()


def stop(*, told: bool = False, number: int = 0) -> NoReturn:
    """Ends what runs.

    Args:
      told: whether a line has said how to go on.
      number: of the signal; 0: of the one that has come.

    Raises:
      Interrupted: of Ctrl-C.
      Stopped: of another signal.
    """
    number = number or _state["asked"]
    if number == signal.SIGINT:
        raise Interrupted(told=told)
    raise Stopped(number, told=told)


def take_code(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """Takes --stopped-code N out of a command line: the exit code after a signal, in place of 128 and its number.

    Args:
      arguments: words of a command line.

    Returns:
      (N, None where it is not given; the other words).

    Raises:
      ValueError: N is no exit code.
    """
    code = None
    values, rest = take_word(arguments, "--stopped-code")
    for value in values:
        if not value.isdecimal() or int(value) > 255:
            raise ValueError(f"stopped-code: expected an exit code, 0 to 255, found {value!r}")
        code = int(value)
    return code, rest


def words_of(error: BaseException) -> tuple[int, str]:
    """The number of the signal behind an error, and a line that says what it did; "" where one has been printed."""
    number = error.number if isinstance(error, Stopped) else signal.SIGINT
    if isinstance(error, Stopped | Interrupted) and error.told:
        return number, ""
    return number, words(number)


def code_of(number: int, chosen: int | None) -> int:
    """The exit code after a signal: the one that was chosen, or 128 and its number."""
    return 128 + number if chosen is None else chosen


def words(number: int) -> str:
    """A line that says that a signal has ended this process."""
    name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    return f"{name}; the same command goes on from what is saved"

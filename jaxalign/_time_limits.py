"""A call that is given a time: what has not returned by then is left, with an error.

In the main thread an alarm ends the call wherever it is, also in a sleep or a read; a job ends where the call takes one
alarm after the other for an error of its own. In other threads, such as those in which JAX runs callbacks, the call has
a thread of its own, which is told to end and left behind if it does not. Code that holds the interpreter, as a regular
expression does while it matches, is ended by neither.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import math
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeAlias, TypeVar

from jaxalign import _signals

T = TypeVar("T")

_default = [0.0]
"""Seconds that a program of the user's has where its caller gives none; 0: no limit."""

End: TypeAlias = Callable[[str, int], NoReturn]
"""Ends the process with a line, of a time limit or of a signal, and the signal's number; 0 for none."""

PATIENCE = 4
"""How many alarms a call may take for errors of its own before the job ends."""

_ends: list[End] = []


class TimeLimit(BaseException):
    """A call has not returned in its time. No Exception, so that the code that is ended does not take it for one.

    Attributes:
      seconds: the time that it had.
      frames: what it was doing, the innermost frame last; () where its traceback says so.
    """

    def __init__(self, seconds: float, frames: tuple[tuple[str, int], ...] = ()) -> None:
        super().__init__(f"no answer within {seconds:g} s")
        self.seconds = seconds
        self.frames = frames


def set_default(seconds: float) -> None:
    """Sets the time that programs have where their callers give none.

    Args:
      seconds: 0 for no limit.

    Raises:
      ValueError: a negative number, or one that is not finite.
    """
    check_seconds(seconds, "reward-timeout")
    _default[0] = float(seconds)


def check_seconds(seconds: float, name: str) -> None:
    """ValueError for what is no time to wait [s]."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise ValueError(f"{name}: expected a finite number of seconds >= 0, found {seconds!r}")


@contextlib.contextmanager
def ending(end: End) -> Iterator[None]:
    """A job that ends where neither an alarm nor a signal gets out of a call.

    Args:
      end: ends the process.
    """
    _ends.append(end)
    try:
        yield
    finally:
        _ends.remove(end)


def within(call: Callable[[], T], seconds: float | None = None, words: Callable[[TimeLimit], str] = str) -> T:
    """Gives what a call returns.

    Args:
      call: runs once.
      seconds: that it may take; None: the default; 0: no limit.
      words: the line with which a job ends where the call cannot be ended.

    Returns:
      Its result. What it raises is raised.

    Raises:
      TimeLimit: it has not returned in time.
    """
    limit = _default[0] if seconds is None else seconds
    if not limit:
        return call()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _by_alarm(call, limit, words)
    return _by_thread(call, limit)


def _by_alarm(call: Callable[[], T], seconds: float, words: Callable[[TimeLimit], str]) -> T:
    late: list[TimeLimit] = []
    rung = [0]

    def ring(_: int, frame: types.FrameType | None) -> None:
        rung[0] += 1
        number = 0 if _signals.deferring() else _signals.asked()
        if not number:
            late.append(TimeLimit(seconds, _frames(frame)))
        if rung[0] > PATIENCE and _ends:
            _ends[-1](_signals.words(number) if number else words(late[0]), number)
        if number:
            _signals.stop()
        raise late[-1]

    def insist() -> None:
        signal.setitimer(signal.ITIMER_REAL, 2.0, 1.0)

    handler = signal.signal(signal.SIGALRM, ring)
    _signals.before_end.append(insist)
    # Once a second again, for code that catches everything.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            found = call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if late:
            raise late[0]  # it went on as after an error of its own
        return found
    except (KeyboardInterrupt, _signals.Stopped, TimeLimit):
        raise
    except BaseException:
        if late:
            raise late[0] from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _signals.before_end.remove(insist)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def _by_thread(call: Callable[[], T], seconds: float) -> T:
    found: list[tuple[Any, BaseException | None]] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            found.append((context.run(call), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        frames = _frames(sys._current_frames().get(thread.ident or 0))
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeLimit(seconds, frames)
    value, error = found[0]
    if error is not None:
        raise error
    result: T = value
    return result


def _frames(frame: types.FrameType | None) -> tuple[tuple[str, int], ...]:
    found: list[tuple[str, int]] = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(reversed(found))

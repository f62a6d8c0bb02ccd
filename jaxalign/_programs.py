"""Programs of the user's that run on the host, also from within compiled ones: what they raise or give in place of
numbers comes out as one ValueError that names the program, its file and line, and what came.

JAX wraps what a callback raises into a JaxRuntimeError that holds the text of two tracebacks, and logs it. Functions
that may run such a program are decorated by `tells_programs`, which raises the program's own error in its place.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import logging
import os
import pathlib
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

from jaxalign import _signals, _time_limits

P = ParamSpec("P")
T = TypeVar("T")

_raised: collections.deque[BaseException] = collections.deque(maxlen=8)
"""What callbacks raised last, a signal's end among it: their errors reach the caller as text alone."""


class ProgramError(ValueError):
    """A program of the user's raised, or gave something else than what is expected of it."""


_running = threading.Lock()
_folders: list[str] = []
"""The folder in which the programs that run now began, once for each."""


@contextlib.contextmanager
def in_folder() -> Iterator[None]:
    """Has this process stay in its folder, to which the relative paths of a job belong, whatever runs within."""
    with _running:
        if _folders:  # one of several at once may have left it
            _folders.append(_folders[0])
        else:
            with contextlib.suppress(OSError):  # the folder has been removed
                _folders.append(os.getcwd())
    try:
        yield
    finally:
        with _running, contextlib.suppress(OSError):
            if _folders:
                os.chdir(_folders.pop())


@contextlib.contextmanager
def naming(function: object, name: str, expected: str, *, rows: str = "") -> Iterator[None]:
    """Turns what is raised within into a ProgramError that names the function, its place and what was expected.

    Args:
      function: the user's, which runs within.
      name: what the error calls it.
      expected: what it should have given.
      rows: of the batch, for the error, as `of_prompts` writes them.

    Raises:
      ProgramError: from whatever was raised; a program that ends the process (sys.exit) does not end it. Signals and
        KeyboardInterrupt stay what they are.
    """
    try:
        with in_folder():
            yield
    except ProgramError:
        raise
    except _time_limits.TimeLimit as error:
        raise ProgramError(_late(error, function, name, expected, rows)) from None
    except (KeyboardInterrupt, _signals.Stopped):
        raise
    except BaseException as error:  # extensions in other languages raise what is no Exception
        if isinstance(error, ValueError) and _is_ours(function):
            raise  # which names what it is about
        if isinstance(error, SystemExit) and _from_ours(error):
            raise  # of a signal that ends the run
        where = _raised_at(function, error)
        raise ProgramError(f"{name}: expected {expected}, found {words_of(error)}{rows}{where}") from error


def words_of(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _late(error: _time_limits.TimeLimit, function: object, name: str, expected: str, rows: str) -> str:
    """What is told of a program that has not returned in time."""
    found = f"no answer within {error.seconds:g} s (--reward-timeout)"
    return f"{name}: expected {expected}, found {found}{rows}{_raised_at(function, error)}"


def called(
    function: object, call: Callable[[], T], *, name: str, expected: str, rows: str = "", timeout: float | None = None
) -> T:
    """Calls a program of the user's, once, within its time.

    Args:
      function: the program; the library's own have no limit.
      call: runs it.
      name, expected, rows: as in `naming`.
      timeout: seconds that it may take; None: what --reward-timeout says; 0: no limit.

    Returns:
      What `call` gives.

    Raises:
      ProgramError: as of `naming`, and for a program that has not returned in time.
    """
    try:
        with naming(function, name, expected, rows=rows):
            limit = 0.0 if _is_ours(function) else timeout
            return _time_limits.within(call, limit, lambda error: _late(error, function, name, expected, rows))
    finally:
        if threading.current_thread() is threading.main_thread():
            _signals.check()  # the program may have taken a signal for an error of its own


def of_prompts(index: Sequence[int]) -> str:
    """Writes the rows of a batch for an error: which prompts they are of.

    Args:
      index: of each row the number of its prompt.

    Returns:
      " for 4 rows, of the prompts 0, 2".
    """
    numbers = list(dict.fromkeys(int(i) for i in index))
    shown = ", ".join(map(str, numbers[:8])) + ", …" * (len(numbers) > 8)
    return f" for {len(index)} rows, of the prompts {shown}" if numbers else ""


def defined_at(function: object) -> str:
    """ " (FILE, line N)" of a function's definition; "" of the library's own and of what has none."""
    code = getattr(_unwrapped(function), "__code__", None)
    if code is None or _is_ours(function):
        return ""
    return f" ({code.co_filename}, line {code.co_firstlineno})"


def _is_ours(function: object) -> bool:
    """Whether a function is the library's own."""
    code = getattr(_unwrapped(function), "__code__", None)
    return code is not None and pathlib.Path(code.co_filename).is_relative_to(pathlib.Path(__file__).parent)


def _unwrapped(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    return function if hasattr(function, "__code__") else vars(type(function)).get("__call__", function)


def _raised_at(function: object, error: BaseException) -> str:
    """The line of the function's own file at which an error was raised, the innermost; else its definition."""
    code = getattr(_unwrapped(function), "__code__", None)
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, _time_limits.TimeLimit) and error.frames:
        frames = list(error.frames)
    lines = [line for file, line in frames if code is not None and file == code.co_filename]
    return defined_at(function) if not lines or code is None else f" ({code.co_filename}, line {lines[-1]})"


def _from_ours(error: BaseException) -> bool:
    """Whether the library's own code raised an error, as a handler of signals does."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and pathlib.Path(frames[-1].filename).is_relative_to(pathlib.Path(__file__).parent)


def for_callback(call: Callable[P, T]) -> Callable[P, T]:
    """A function for jax.pure_callback, whose ValueErrors `tells_programs` finds again."""
    _quiet()

    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except (ValueError, KeyboardInterrupt, SystemExit) as error:  # on a CPU this may be the main thread
            _raised.append(error)
            raise

    return run


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Raises the error of a program that failed in a callback within, or what a signal raised there, in place of
    JAX's."""
    try:
        yield
    except Exception as error:
        text = str(error)
        # By its name, since commands of no computation have no jax; numpy's read of a result gives a ValueError.
        jaxs = type(error).__name__ == "JaxRuntimeError" or text.startswith("INTERNAL: ")
        own = next((kept for kept in reversed(_raised) if jaxs and _as_jax_tells(kept) in text), None)
        if own is None:
            raise
        raise own.with_traceback(None) from own.__cause__


def _as_jax_tells(error: BaseException) -> str:
    """What JAX's text has of an error."""
    return str(error) if isinstance(error, ValueError) else type(error).__name__


def tells_programs(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function raise the error of a program that failed in a callback in place of JAX's.

    Where a program was called at all, the function waits for its results: on an accelerator they would otherwise fail
    where they are read.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with telling():
            found = function(*args, **kwargs)
            return _waited(found) if _quiet.cache_info().currsize else found

    return run


def _waited(found: T) -> T:
    import jax

    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found)):
        return found
    waited: T = jax.block_until_ready(found)
    return waited


@functools.lru_cache(maxsize=1)
def _quiet() -> None:
    """Keeps JAX from logging the traceback of an error that is about to be raised by its own name."""
    logging.getLogger("jax._src.callback").addFilter(
        lambda record: not (record.exc_info and any(record.exc_info[1] is kept for kept in _raised))
    )

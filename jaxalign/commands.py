"""The `jaxalign` command: every job of train/ and eval/ by its name, in a clone and from a wheel alike.

A job is a module with a dataclass `Config` and a function `run(config)`; its docstring is its help. A folder with a
`__main__.py` is a group of jobs: `jaxalign bench train`. Jobs are found by reading their files, so `--help` imports
none of them.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import os
import pathlib
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TextIO

from jaxalign import _locks, _signals, _time_limits, launch
from jaxalign._options import from_fields, parse
from jaxalign._programs import telling, tells_programs
from jaxalign._version import __version__
from jaxalign.launch import compilation, processes, time_limit

if TYPE_CHECKING:
    from tyro.conf import Positional
    from tyro.conf import UseAppendAction as Repeated

__all__ = [
    "Job",
    "Positional",
    "Repeated",
    "choose",
    "execute",
    "from_fields",
    "jobs",
    "load",
    "main",
    "parse",
    "run",
    "start",
]

FOLDERS = {"train": "Training", "eval": "Decoding and evaluation"}
USAGE, FAILED, CLOSED = 2, 1, 141  # exit codes


class Job(Protocol):
    """A module that `jaxalign NAME` runs."""

    __name__: str
    Config: Any
    """The dataclass of the job's options."""

    def run(self, config: Any) -> Any:
        """Does the job.

        Args:
          config: an instance of the module's Config.

        Returns:
          The job's result: the summary of a training run, the path or the rows of an evaluation.
        """


def __getattr__(name: str) -> Any:
    # Marks of an option that is given once for each value, and of words without --. Read when the command line is: tyro
    # is loaded then.
    if name == "Repeated":
        from tyro.conf import UseAppendAction

        return UseAppendAction
    if name == "Positional":
        from tyro.conf import Positional

        return Positional
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the `jaxalign` command. Ends the process; see `execute` for exit codes."""
    execute(start, arguments)


def start(arguments: Sequence[str]) -> Any:
    """Does what a command line asks, in this process.

    Args:
      arguments: the words after `jaxalign`, such as ["sft", "--data", "texts.jsonl", "--out", "runs/sft"].

    Returns:
      The job's result, None for help and version.

    Raises:
      SystemExit: the job or an option is not known (exit code 2), or --help has been printed (0).
      ValueError: an option or an input of the job is not as expected.
    """
    if arguments and arguments[0] == "--version":
        print(f"jaxalign {__version__}")
        return None
    found = {name: line for folder in FOLDERS for name, line in jobs(f"{launch.__name__}.{folder}").items()}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else USAGE)
    name, rest = arguments[0], list(arguments[1:])
    _check_name(name, found, "jaxalign")
    with _signals.importing():
        module = load(name)
    if hasattr(module, "Config"):
        return _run_with(module, rest, prog=f"jaxalign {name}")
    return choose(module.__name__, rest)


def choose(package: str, arguments: Sequence[str] | None = None) -> Any:
    """Runs a job of a group, such as `eval.bench`.

    Args:
      package: name of the package whose modules are the jobs.
      arguments: the job's name and its options; the process's own where it is None.

    Returns:
      The job's result.

    Raises:
      SystemExit: no job or one that is not known (exit code 2), or --help has been printed (0).
      ValueError: an option or an input of the job is not as expected.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    inside = package.startswith(launch.__name__)
    prog = f"jaxalign {package.rpartition('.')[2]}" if inside else f"python -m {package}"
    if processes.label():
        raise ValueError(f"processes: expected one process for {prog}, found several")
    found = jobs(package)
    if not arguments or arguments[0] in ("-h", "--help"):
        text = f"usage: {prog} NAME [options]\n\n{_spoken(_group(package).__doc__ or '', prog)}\n{_listed(found)}"
        print(text, file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else USAGE)
    name = arguments[0].removeprefix("--")
    _check_name(name, found, prog)
    with _signals.importing():
        module = importlib.import_module(f"{package}.{name}")
    return _run_with(module, arguments[1:], prog=f"{prog} {name}")


@tells_programs
def run(job: str, /, **options: Any) -> Any:
    """Does a job of the command in this process: run("rl", model=folder, prompts=file, reward=folder, out="runs/rl").

    Args:
      job: its name after `jaxalign`, with the group where there is one: "sft", "bench train".
      options: the job's options by their names on the command line, with underscores; lists serve as tuples.

    Returns:
      What the job's `run` gives: the summary of a training run, the path or the rows of an evaluation.

    Raises:
      ValueError: no such job; an option that it does not have, lacks, or has another type for.
    """
    module: Job = load(job)
    with _signals.handled(), _locks.released():
        return module.run(from_fields(module.Config, options, where=job))


def load(job: str) -> Any:
    """The module of a job (`Job`), or a group's package; ValueError names the closest where there is none."""
    names = job.split()
    package = next((f for f in FOLDERS if names and names[0] in jobs(f"{launch.__name__}.{f}")), None)
    if package is None:
        every = [name for folder in FOLDERS for name in jobs(f"{launch.__name__}.{folder}")]
        raise ValueError(_unknown(job, every))
    return importlib.import_module(".".join((launch.__name__, package, *names)))


def jobs(package: str) -> dict[str, str]:
    """Name -> one line, of the jobs of a package: its modules with a `main`, its packages with a `__main__.py`."""
    found = {}
    for folder in importlib.import_module(package).__path__:
        for path in sorted(pathlib.Path(folder).glob("*")):
            source = path / "__main__.py" if path.is_dir() else path
            if source.suffix != ".py" or path.stem.startswith("_") or not source.is_file():
                continue
            tree = ast.parse(source.read_text(encoding="utf-8"))
            if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
                line = (ast.get_docstring(tree) or "").partition("\n")[0]
                found[path.stem] = line.removeprefix(f"python -m {package.removeprefix(launch.__name__ + '.')} ")
                found[path.stem] = found[path.stem].removeprefix(f"{path.stem}: ").rstrip(":")
    return found


def execute(main: Callable[[list[str]], Any], arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a program's `main` on its arguments and ends the process.

    The words about processes (`launch.processes`) are taken out, and these are joined before `main` runs; so is the
    folder of compiled programs (`launch.compilation`). An error is
    one line on stderr; --debug, anywhere among the arguments, shows the traceback as well. A warning, which
    tells what was passed over or cut, is one line too. Exit codes: 0;
    2 for usage (a ValueError, which names what is wrong with an option or an input); 1 for a run that failed otherwise;
    143 after TERM, 130 after Ctrl-C and 129 after HUP, or N of --stopped-code N; 141 where nobody reads stdout.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, code, alone = "--debug" in given, None, _is_alone(sys._getframe())

    def give_up(words: str, number: int) -> NoReturn:
        """Within a handler of signals, where what is being printed cannot be printed to."""
        processes.claim()
        line = words if number else f"error: {processes.label()}{words}"
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
        ended = _signals.code_of(number, code) if number else USAGE
        if processes.label():
            processes.end(ended)
        os._exit(ended)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            code, rest = _signals.take_code([word for word in given if word != "--debug"])
            with _signals.handled(last=alone), _locks.released():
                joined, rest = processes.take(rest)
                cache, rest = compilation.take(rest)
                seconds, rest = time_limit.take(rest)
                processes.start(joined, stopped_code=code)
                compilation.start(cache)
                time_limit.start(seconds)
                try:
                    with telling(), _time_limits.ending(give_up):
                        main(rest)
                finally:
                    compilation.tell(cache)
                if sys.stdout is not None:
                    sys.stdout.flush()
                processes.leave()
    except (KeyboardInterrupt, _signals.Stopped) as error:
        number, words = _signals.words_of(error)
        processes.claim()
        _say(words)
        _end(_signals.code_of(number, code), alone=alone)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        _no_more_output()
        _end(CLOSED, alone=alone)
    except Exception as error:
        if isinstance(error, OSError) and not _can_print():
            _no_more_output()
        if debug:
            traceback.print_exc()
        shared = "Gloo" in str(error)[:200] or type(error).__name__ == "JaxRuntimeError"
        usage = isinstance(error, ValueError) and not shared
        processes.claim()
        if shared and (number := processes.stopped()):  # another process has ended first, of the same signal
            _say(_signals.words(number))
            _end(_signals.code_of(number, code), alone=alone)
        lost = "" if usage else processes.gone()
        words = str(error).partition("\n-----")[0]  # below that, jax speaks of its own frames
        words = " ".join(words.split()) if usage else next(iter(words.strip().splitlines()), "")
        kind = "" if usage else f"{type(error).__name__}: "
        hint = "" if debug else " (--debug shows the traceback)"
        _say(f"error: {processes.label()}{lost or f'{kind}{words}{hint}'}")
        _end(USAGE if usage else FAILED, alone=alone)
    _signals.at_end()
    sys.exit(0)


def _say(line: str) -> None:
    """Prints a line on stderr, where that takes one."""
    with contextlib.suppress(OSError, ValueError):
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)


def _can_print() -> bool:
    """Whether what is printed arrives: a full disk or a closed stream takes no line."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


def _no_more_output() -> None:
    """Leads stdout nowhere, or the interpreter's last flush fails as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(code: int, *, alone: bool) -> NoReturn:
    """Ends a process that failed. One of several does not say goodbye to jax, which would wait for the others; and one
    that is alone leaves out the interpreter's end: a computation may still be running on jax's threads, and would
    crash while what it uses is taken down."""
    if processes.label():
        processes.end(code)
    if alone:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _is_alone(frame: types.FrameType | None) -> bool:
    """Whether a function was called by the program that Python was started with, and not by another one, such as a test
    or a notebook, that goes on."""
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "<module>" or frame.f_globals.get("__name__") != "__main__":
        return False
    outside = frame.f_back
    while outside is not None and outside.f_globals.get("__name__") == "runpy":  # python -m
        outside = outside.f_back
    return outside is None


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a warning as one line: with its place where it is not one of the library's own."""
    place = "" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}: "
    print(f"note: {processes.label()}{place}{' '.join(str(message).split())}", file=sys.stderr)


@tells_programs
def _run_with(module: Any, arguments: list[str], *, prog: str) -> Any:
    description = _spoken(module.__doc__ or "", prog)
    config = parse(module.Config, description=description, args=arguments, prog=prog)
    with _locks.released():
        return module.run(config)


def _check_name(name: str, known: dict[str, str], prog: str) -> None:
    if name not in known:
        print(f"{prog}: error: {_unknown(name, list(known))}", file=sys.stderr)
        raise SystemExit(USAGE)


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, cutoff=0.5)
    return f"job: expected {'a name like' if close else 'one of'} {', '.join(close or sorted(known))}, found {name!r}"


def _help() -> str:
    text = "usage: jaxalign JOB [options]\n\nInference-time alignment of language models: train, decode, evaluate.\n"
    for folder, title in FOLDERS.items():
        text += f"\n{title}:\n{_listed(jobs(f'{launch.__name__}.{folder}'))}\n"
    text += "\nOf several processes: --distributed, or --coordinator HOST:PORT --num-processes N --process-id I.\n"
    text += "--stopped-code N is the exit code after TERM, HUP and Ctrl-C, in place of 143, 129 and 130.\n"
    text += "Compiled programs are kept from one start to the next by --compilation-cache DIR.\n"
    text += "A call of a program MODULE:FUNCTION may take --reward-timeout SECONDS (3600; 0: no limit).\n"
    return text + "jaxalign JOB --help lists its options; --debug shows the traceback of an error; --version."


def _listed(found: dict[str, str]) -> str:
    width = max(map(len, found))
    return "\n".join(f"    {name:{width}}  {line}" for name, line in found.items())


def _group(package: str) -> Any:
    return importlib.import_module(f"{package}.__main__")


def _spoken(text: str, prog: str) -> str:
    """A docstring's commands in the form in which this one was given."""
    if not prog.startswith("jaxalign"):
        return text
    return re.sub(r"python -m (?:train|eval)\.(\w+)", r"jaxalign \1", text)

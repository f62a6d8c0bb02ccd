"""Starting one of several processes: the words of a command line that say so, and jax.distributed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

WORDS = {"--coordinator": "HOST:PORT", "--num-processes": "N", "--process-id": "I"}
"""Word of the command line -> what follows it."""

TASKS = {"SLURM_PROCID": "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE"}
"""Variable of a launcher that numbers this task -> the one that counts them. They are set where it started us."""


class Processes(NamedTuple):
    """How the processes find each other; None where jax finds it out (Slurm, Open MPI, Cloud TPU, Kubernetes)."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    number: int | None = None
    """Number of processes."""
    identity: int | None = None
    """Which of them this is, from 0."""


def take(arguments: Sequence[str]) -> tuple[Processes | None, list[str]]:
    """Takes the words about processes out of a command line.

    Args:
      arguments: any of --distributed, --coordinator HOST:PORT, --num-processes N and --process-id I among others.

    Returns:
      (how the processes find each other, None for a single one; the other words). A launcher that has started several
      tasks, Slurm or Open MPI, counts as --distributed.

    Raises:
      ValueError: one of the three without the others, a value that is missing or out of range.
    """
    rest, given, distributed = list[str](), dict[str, str](), False
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--distributed":
            distributed = True
        elif name in WORDS:
            given[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    if given:
        if lacking := [name for name in WORDS if not given.get(name)]:
            raise ValueError(f"{lacking[0][2:]}: expected {lacking[0]} {WORDS[lacking[0]]} with {', '.join(given)}")
        return _read(given), rest
    return (Processes() if distributed or _launched(os.environ) else None), rest


def _read(given: Mapping[str, str]) -> Processes:
    host, _, port = given["--coordinator"].rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator: expected HOST:PORT, found {given['--coordinator']!r}")
    for name, least in (("--num-processes", 1), ("--process-id", 0)):
        if not given[name].isdecimal() or int(given[name]) < least:
            raise ValueError(f"{name[2:]}: expected an integer >= {least}, found {given[name]!r}")
    count, index = int(given["--num-processes"]), int(given["--process-id"])
    if index >= count:
        raise ValueError(f"process-id: expected one below --num-processes {count}, found {index}")
    return Processes(given["--coordinator"], count, index)


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one of several tasks."""
    return any(
        number in environment and environment.get(total, "1").isdecimal() and int(environment.get(total, "1")) > 1
        for number, total in TASKS.items()
    )


def start(processes: Processes | None, *, stopped_code: int | None = None) -> None:
    """Joins the processes, once and before any device is touched. The first alone prints on stdout from then on, and
    what ends one of them ends all (`_ties`).

    Args:
      processes: how they find each other; None: there is one, and nothing is done.
      stopped_code: exit code after a signal; None: 128 and its number.

    Raises:
      ValueError: jax finds no cluster around this process.
    """
    if processes is None:
        return
    from jaxalign import _signals

    with _signals.importing():
        import jax  # a command line that asks for help does not load it

        from jaxalign import _hosts, _ties

    if jax.distributed.is_initialized():
        return
    coordinator, number, identity = processes
    try:
        jax.distributed.initialize(coordinator, number, identity)
    except ValueError as error:
        raise ValueError(
            "distributed: expected a process of Slurm, Open MPI, Cloud TPU or Kubernetes, or --coordinator HOST:PORT "
            f"--num-processes N --process-id I, found neither ({error})"
        ) from error
    _signals.again()
    _hosts.say_once()
    if _hosts.count() > 1:
        _ties.choose_code(stopped_code)
        _ties.join(coordinator)


def label() -> str:
    """ "process 1 of 2: " for messages, "" where there is one process."""
    if "jax" not in sys.modules:  # it was not asked for several
        return ""
    from jaxalign import _hosts

    return _hosts.label()


def claim() -> None:
    """Called before this process tells why it ends: of several it waits here for its end where that is told already."""
    if label():
        from jaxalign import _signals, _ties

        _signals.ignore_rest()  # the end takes seconds, and a scheduler may send its signal to every process
        _ties.claim()


def gone() -> str:
    """What there is to say about another process of the run that is gone, which shared computations fail of; "" where
    there is none."""
    if not label():
        return ""
    from jaxalign import _ties

    return _ties.gone()


def stopped() -> int:
    """The number of the signal that has come to one of several processes of a run; 0 where none has."""
    if not label():
        return 0
    from jaxalign import _ties

    return _ties.stopped()


def leave() -> None:
    """Tells the other processes that this one is done, and waits until all are."""
    if label():
        from jaxalign import _ties

        _ties.leave_together()


def end(code: int) -> NoReturn:
    """Ends this process of several with an exit code, process 0 last."""
    from jaxalign import _ties

    _ties.end(code)

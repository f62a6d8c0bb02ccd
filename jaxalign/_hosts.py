"""Several processes that run one program (jax.distributed): which of them this is, arrays that lie across them, and
what one of them does for all.

Without jax.distributed there is one process, and every function here is the plain thing: `host_value` is np.asarray,
`put` is jax.device_put, `barrier` and `agree` do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

T = TypeVar("T")


def count() -> int:
    """The number of processes. It starts no backend where there is one process."""
    return _place()[1] if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which process this is, from 0."""
    return _place()[0] if jax.distributed.is_initialized() else 0


@functools.cache
def _place() -> tuple[int, int]:
    """(which process this is, of how many). Kept, for it is asked at the end too, when jax has dropped its devices."""
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes what is written once: folders, JSON, metrics."""
    return index() == 0


def label() -> str:
    """ "process 1 of 2: " for messages, "" where there is one process."""
    return f"process {index()} of {count()}: " if count() > 1 else ""


def check_single(job: str) -> None:
    """ValueError where a job that one process does is run by several."""
    if count() > 1:
        raise ValueError(f"processes: expected one process for {job}, found {count()}")


# Arrays ---------------------------------------------------------------------------------------------------------------


def is_spread(x: Any) -> bool:
    """Whether an array lies in part on devices of other processes: its values are not at hand here."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def host_value(tree: Any) -> Any:
    """Fetches arrays, also those that lie across processes: all processes have to call it, in the same order.

    Args:
      tree: arrays, numbers and what else np.asarray takes.

    Returns:
      The same tree of numpy arrays, equal on every process.
    """
    return jax.tree.map(_fetched, tree)


def _fetched(x: Any) -> np.ndarray:
    if not is_spread(x):
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def put(tree: T, shardings: Any) -> T:
    """Places arrays as jax.device_put does, also on a mesh of several processes: each process places its own part of
    what all of them hold.

    Args:
      tree: arrays, equal on every process.
      shardings: one sharding, or a tree of them.

    Returns:
      The same tree of jax arrays.
    """
    if count() == 1:
        placed: T = jax.device_put(tree, shardings)
        return placed
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: _placed(x, shardings), tree)  # type: ignore[no-any-return]
    return jax.tree.map(_placed, tree, shardings)  # type: ignore[no-any-return]


def _placed(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if sharding.is_fully_addressable:
        local: jax.Array = jax.device_put(x, sharding)
        return local
    if is_spread(x):
        moved: jax.Array = jax.jit(lambda x: x, out_shardings=sharding)(x)
        return moved
    # Not jax.device_put: it sends every array around to see whether the processes agree.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


# What one does for all ------------------------------------------------------------------------------------------------


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gather_texts(text: str) -> list[str]:
    """The text of every process, in their order."""
    if count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(data.size, np.int32))
    wide = np.zeros(max(int(sizes.max()), 1), np.uint8)
    wide[: data.size] = data
    return [row[:n].tobytes().decode() for row, n in zip(multihost_utils.process_allgather(wide), sizes, strict=True)]


def from_first(text: str) -> str:
    """The text of the first process, on every process."""
    return gather_texts(text)[0]


def agree(error: Exception | None) -> None:
    """Raises on every process the error of the first process that has one: a process that alone went on would wait for
    the others. All processes have to call it."""
    if count() == 1:
        if error is not None:
            raise error
        return
    kind = "" if error is None else "usage " if isinstance(error, ValueError) else "other "
    found = [text for text in gather_texts(kind + ("" if error is None else str(error))) if text]
    if found:
        told, _, words = found[0].partition(" ")
        raise (ValueError if told == "usage" else RuntimeError)(words) from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a block that no process waits in on every process; an error of one is raised in all (`agree`)."""
    try:
        yield
    except Exception as error:
        agree(error)
    else:
        agree(None)


def first_then_others(first: Callable[[], T], others: Callable[[], T]) -> T:
    """Does something on the first process and, once that is done, something else on the others.

    Args:
      first: what the first process does, such as making a folder.
      others: what the others do then, such as looking whether it is there.

    Returns:
      What this process's function gave.

    Raises:
      ValueError, RuntimeError: what the function of any process raised, on all of them.
    """
    found: list[T] = []
    with together():
        if is_first():
            found.append(first())
    with together():
        if not is_first():
            found.append(others())
    return found[0]


def own_share(rows: int) -> range:
    """The rows of this process, of so many that are dealt out in order."""
    return range(index() * rows // count(), (index() + 1) * rows // count())


def begin_any(flag: bool) -> Callable[[], bool]:
    """Begins to find out whether a flag is set in any process; nobody waits. All processes have to call it, in the same
    order.

    Args:
      flag: of this process.

    Returns:
      A function that waits for the answer, which is the same in all of them.
    """
    if count() == 1:
        return lambda: flag
    spread, add = _sum_of_flags()
    own = np.full((1,), flag, np.int32)
    found = add(jax.make_array_from_callback((count(),), spread, lambda _: own))
    return lambda: bool(np.asarray(found.addressable_data(0)))


@functools.cache
def _sum_of_flags() -> tuple[jax.sharding.Sharding, Callable[[jax.Array], jax.Array]]:
    """How a flag of each process lies on one device of each, and their sum."""
    firsts = [next(d for d in jax.devices() if d.process_index == i) for i in range(count())]
    mesh = jax.sharding.Mesh(np.asarray(firsts), ("process",))
    every = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("process"))
    return spread, jax.jit(lambda x: x.sum(), out_shardings=every)


class HostRows(Protocol):
    """A host function of rows: arrays [n,...] -> [n] real numbers."""

    def __call__(self, *arrays: np.ndarray) -> np.ndarray: ...


def in_shares(f: HostRows, *arrays: np.ndarray) -> np.ndarray:
    """Applies a host function of rows where each process does its share of them.

    Args:
      f: f(*arrays [n,...]) -> [n] real numbers.
      arrays: [N,...] each, equal on every process.

    Returns:
      [N] float64, equal on every process.

    Raises:
      ValueError, RuntimeError: an error of f on any process, on all of them.
    """
    own, rows = own_share(len(arrays[0])), len(arrays[0])
    values = np.zeros(0)
    with together():
        if own:
            values = np.asarray(f(*(a[own.start : own.stop] for a in arrays)), np.float64)
    if count() == 1:
        return values
    from jax.experimental import multihost_utils

    # As bytes: jax would take float64 for float32.
    wide = np.zeros(-(-rows // count()) + 1)
    wide[: len(values)] = values
    every = multihost_utils.process_allgather(wide.view(np.uint8)).view(np.float64)
    sizes = [(i + 1) * rows // count() - i * rows // count() for i in range(count())]
    return np.concatenate([part[:n] for part, n in zip(every, sizes, strict=True)])


def dealt(parts: Sequence[T]) -> Sequence[T]:
    """Those of some parts of a job (shards, batches) that are this process's, dealt out in turn."""
    return parts[index() :: count()]


def say_once() -> None:
    """From here on the first process alone prints on stdout: what is told there is of the whole run."""
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process

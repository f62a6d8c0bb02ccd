"""Checkpoints by orbax: train state and data position together, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import pathlib
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from jaxalign import _hosts, _io, _signals

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

S = TypeVar("S")
ANOTHER = "name another --out, or remove that folder"
DIGESTS = "digests.json"
"""File of a checkpoint -> its digest, in the checkpoint's folder."""


def open_checkpoints(folder: str | pathlib.Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints. Saves run in the background, into a temporary folder that is renamed at the end:
    after a kill the newest whole one is found, and what was cut short is removed.

    Args:
      folder: of the checkpoints; it is made where it does not exist.
      keep: how many of the newest stay.

    Returns:
      Its manager.
    """
    import orbax.checkpoint as ocp  # it takes seconds, and a run alone needs it

    # What fails is raised, and told in one line; orbax would log it as well, in hundreds.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_orbax)
    # Removed here and one by one: orbax removes a folder and the temporary ones inside it at the same time, which fails
    # now and then.
    path = pathlib.Path(folder).resolve()
    with _hosts.together():
        if _hosts.is_first():
            for cut_short in path.glob("*orbax-checkpoint-tmp*"):
                _remove(cut_short)
    seal = ocp.AsyncOptions(post_finalization_callback=lambda: _seal_written(path))
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, async_options=seal)
    return ocp.CheckpointManager(path, options=options)


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder, or what else has its name. Where a save failed in this process, its other parts may still write
    there for a moment."""
    until = time.monotonic() + 5
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or time.monotonic() > until:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def opened(folder: str | pathlib.Path, *, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """A context of `open_checkpoints`, at whose end all saves are finished. OSError for one that could not be."""
    manager = open_checkpoints(folder, keep=keep)
    try:
        yield manager
    except BaseException:
        try:
            manager.close()
        except Exception:  # the error that was first is told
            _let_end()
        raise
    with _storage(pathlib.Path(folder)):
        manager.close()


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until all saves are on disk. OSError for one that could not be."""
    with _storage(pathlib.Path(str(manager.directory))):
        manager.wait_until_finished()


@contextlib.contextmanager
def _storage(folder: pathlib.Path) -> Iterator[None]:
    """Gives what a save fails with as an OSError of one line: it is raised by the next call, with much around it."""
    try:
        yield
    except Exception as error:
        _let_end()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        known = [line for line in lines if "Errno" in line or "OS error" in line or "too large" in line]
        why = next(iter(known), lines[0])[:300]
        raise OSError(
            f"checkpoints: expected to save in {folder}, found {why}; the last one that is whole stays"
        ) from None


def _not_orbax(record: logging.LogRecord) -> bool:
    """Whether a record is not of orbax: asyncio logs what the other parts of a failed save have raised, by its name."""
    trace = record.exc_info[2] if record.exc_info else None
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return "orbax" not in record.pathname and not any("/orbax/" in text for text in (*files, record.getMessage()))


QUIET, MOST = 0.3, 5.0
"""Seconds without a word after which a failed save counts as ended, and the most that are waited for that."""


def _let_end() -> None:
    """Waits until the other parts of a failed save have ended: each says so on stderr, since nobody waits for it."""
    began, before = time.monotonic(), sys.unraisablehook
    last = [began]  # time of the last word

    def heard(found: Any) -> None:
        if str(found.exc_value) == _signals.CLOSED:
            last[0] = time.monotonic()
        else:
            before(found)

    sys.unraisablehook = heard
    try:
        while time.monotonic() < min(last[0] + QUIET, began + MOST):
            time.sleep(QUIET / 10)
    finally:
        sys.unraisablehook = before


def _seal_written(folder: pathlib.Path) -> None:
    """Called when a checkpoint is written and has not its name yet: keeps the digests of its files with them, and has
    all of it on disk."""
    if not _hosts.is_first():
        return
    for written in folder.glob("*orbax-checkpoint-tmp*"):
        files = _files(written)
        digests = _io.file_digests([written / name for name in files])
        _io.write_own_json(written / DIGESTS, dict(zip(files, digests, strict=True)))
        _io.sync_tree(written)


def _files(folder: pathlib.Path) -> list[str]:
    """The files of a checkpoint's items; those beside the items are orbax's own notes."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/**/*") if path.is_file())


def damage(folder: pathlib.Path) -> str:
    """Tells what is wrong with the files of a checkpoint.

    Args:
      folder: of one step.

    Returns:
      The first file that is missing or is not as it was written; "" where there is none. Of a checkpoint from before
      there were digests, only what is missing or empty is seen.
    """
    names = [name for item in ("state", "data") if not any((folder / item).glob("*")) for name in [item]]
    if names:
        return f"{names[0]} is missing"
    try:
        known = _io.read_json(folder / DIGESTS, then="")
    except FileNotFoundError:
        if (folder / DIGESTS).is_symlink():
            return f"{DIGESTS} is a link to nothing"
        empty = [name for name in _files(folder) if (folder / name).stat().st_size == 0]
        return f"{empty[0]} is empty" if empty else ""
    except (ValueError, OSError):
        return f"{DIGESTS} is damaged"
    if lacking := {"state", "data"} - {name.partition("/")[0] for name in known}:
        return f"{DIGESTS} has none of {min(lacking)}"
    found = set(_files(folder))
    if missing := sorted(set(known) - found):
        return f"{missing[0]} is missing"
    digests = _io.file_digests([folder / name for name in sorted(known)])
    other = [name for name, digest in zip(sorted(known), digests, strict=True) if known[name] != digest]
    return f"{other[0]} has another digest" if other else ""


def latest_step(manager: ocp.CheckpointManager) -> int | None:
    """Gives the optimizer steps of the newest whole checkpoint.

    Args:
      manager: as `open_checkpoints` gave it.

    Returns:
      The number; None without a checkpoint.
    """
    newest: int | None = manager.latest_step()
    return newest


def save(manager: ocp.CheckpointManager, state: Any, position: dict[str, Any]) -> None:
    """Saves the state at its step (state.step) with the data position (JSON values), once."""
    import orbax.checkpoint as ocp

    step = int(_hosts.host_value(state.step))
    if manager.latest_step() == step:
        return
    wanted = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position))
    own = pathlib.Path(str(manager.directory)) / str(step)
    with _storage(own.parent):
        if _hosts.is_first() and (own.is_symlink() or own.is_file()):
            _remove(_aside(own))
            own.rename(_aside(own))
        manager.save(step, args=wanted)


def restore(manager: ocp.CheckpointManager, template: S, position: dict[str, Any]) -> tuple[S, int] | None:
    """Reads the newest checkpoint that is whole. A damaged one is told, and set aside beside the others.

    Args:
      manager: of the folder.
      template: a state whose shapes, types and places the arrays take.
      position: what the run's data is (JSON values).

    Returns:
      (state, its step), None without a checkpoint.

    Raises:
      ValueError: the checkpoint was made on other data than `position` names: its batches would not go on; or it is of
        another model: the first array that differs is named, with both shapes.
    """
    folder, passed = pathlib.Path(str(manager.directory)), list[str]()
    while (step := manager.latest_step()) is not None:
        own = folder / str(step)
        why = _hosts.from_first(damage(own) if _hosts.is_first() else "")
        if not why:
            try:
                found = _read(manager, step, template, position)
            except _Mismatch:
                raise
            except Exception as error:
                # With digests the files are as they were written, and of several processes all have to read.
                if (own / DIGESTS).exists() or _hosts.count() > 1:
                    raise
                why = f"it cannot be read, {type(error).__name__}"
            else:
                _tell(folder, passed, f"the run goes on from step {step}")
                return found, step
        aside = _aside(own)
        with _hosts.together():
            if _hosts.is_first():
                _remove(aside)
                own.rename(aside)
        _hosts.barrier("checkpoint set aside")
        manager.reload()
        passed.append(f"checkpoint {step} is damaged ({why}) and set aside as {aside}")
    _tell(folder, passed, "no whole checkpoint is left, and the run begins again")
    return None


def _aside(own: pathlib.Path) -> pathlib.Path:
    """Where what is no whole checkpoint is set aside."""
    return own.with_name(f"damaged-{own.name}")


def _tell(folder: pathlib.Path, passed: list[str], then: str) -> None:
    if passed:
        print(f"{'; '.join(passed)}; {then}", flush=True)


class _Mismatch(ValueError):
    """A whole checkpoint of another run."""


def _read(manager: ocp.CheckpointManager, step: int, template: S, position: dict[str, Any]) -> S:
    """The state of a step. ValueErrors of `restore`, and what orbax raises for damaged files."""
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    # Shapes first, since a read that fails half-way leaves tasks of its own behind.
    if difference := _difference(manager, step, template, names=False):
        raise _Mismatch(f"checkpoint: {difference} in {manager.directory}; {ANOTHER}")
    try:
        found = manager.restore(step, args=wanted)
    except ValueError as error:
        if difference := _difference(manager, step, template, names=True):
            raise _Mismatch(f"checkpoint: {difference} in {manager.directory}; {ANOTHER}") from error
        raise
    changed = {k for k in set(position) | set(found["data"]) if position.get(k) != found["data"].get(k)} - {"step"}
    if changed:
        raise _Mismatch(
            f"data: expected {found['data']} as the checkpoint in {manager.directory} was made with, found {position}; "
            f"{ANOTHER}"
        )
    state: S = found["state"]
    return state


def _difference(manager: ocp.CheckpointManager, step: int, template: Any, *, names: bool) -> str:
    """The first array, parameters first, that a checkpoint has otherwise than a state; "" where none differs. Without
    `names` only arrays that both have are compared."""
    import orbax.checkpoint as ocp

    metadata: Any = ocp.StandardCheckpointer().metadata(manager.directory / str(step) / "state")
    leaves = jax.tree.leaves(metadata.item_metadata.tree, is_leaf=lambda x: hasattr(x, "shape"))
    stored = {leaf.name: tuple(leaf.shape) for leaf in leaves if hasattr(leaf, "shape")}
    named = jax.tree_util.tree_leaves_with_path(template)
    own = {jax.tree_util.keystr(path, simple=True, separator="."): tuple(x.shape) for path, x in named}
    compared = {*stored, *own} if names else {*stored} & {*own}
    for name in sorted(compared, key=lambda name: ("params." not in name, name)):
        if stored.get(name) != own.get(name):
            shape = own.get(name, "no such array")
            return f"{name.replace('.', '/')}: expected {shape} of this model, found {stored.get(name, 'none')}"
    return ""

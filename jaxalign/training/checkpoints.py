"""Checkpoints by orbax: train state and data position together, whole or not at all."""

from __future__ import annotations

import pathlib
import shutil
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from jaxalign import _hosts

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

S = TypeVar("S")
ANOTHER = "name another --out, or remove that folder"


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

    # Removed here and one by one: orbax removes a folder and the temporary ones inside it at the same time, which fails
    # now and then.
    path = pathlib.Path(folder).resolve()
    with _hosts.together():
        if _hosts.is_first():
            for cut_short in path.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(cut_short)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(path, options=options)


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
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)))


def restore(manager: ocp.CheckpointManager, template: S, position: dict[str, Any]) -> tuple[S, int] | None:
    """Reads the newest checkpoint.

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
    import orbax.checkpoint as ocp

    step = manager.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    # Shapes first, since a read that fails half-way leaves tasks of its own behind.
    if difference := _difference(manager, step, template, names=False):
        raise ValueError(f"checkpoint: {difference} in {manager.directory}; {ANOTHER}")
    try:
        found = manager.restore(step, args=wanted)
    except ValueError as error:
        if difference := _difference(manager, step, template, names=True):
            raise ValueError(f"checkpoint: {difference} in {manager.directory}; {ANOTHER}") from error
        raise
    changed = {k for k in set(position) | set(found["data"]) if position.get(k) != found["data"].get(k)} - {"step"}
    if changed:
        raise ValueError(
            f"data: expected {found['data']} as the checkpoint in {manager.directory} was made with, found {position}; "
            f"{ANOTHER}"
        )
    return found["state"], step


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

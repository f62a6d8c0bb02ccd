"""Whether a mesh divides the models and rows of a run: what is asked before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping

from jaxalign import rewards
from jaxalign.models import sharding
from jaxalign.models.hf import folders
from jaxalign.training.options import RolloutOptions


def check_models(found: Mapping[str, str], mesh: str, *, local: bool = False) -> None:
    """Checks by their configurations that models divide over a mesh.

    Args:
      found: role -> folder; "" is passed over.
      mesh: as `sharding.make_mesh` reads it.
      local: whether each of several processes has the models on its part of the mesh.

    Raises:
      ValueError: names the role, the size, what was expected and found, and the folder.
    """
    devices = sharding.make_mesh(mesh, local=local)
    for role, folder in found.items():
        if folder:
            folders.check_fits(folder, devices, name=role)


def check_rollouts(options: RolloutOptions, mesh: str) -> None:
    """Checks that a mesh divides what draws and scores roll-outs. Those that --rollouts names are read, not drawn.

    Args:
      options: the base, the reward, and how many responses are drawn together.
      mesh: as `sharding.make_mesh` reads it.

    Raises:
      ValueError: names the rows, or the model and its size, what was expected and what was found.
    """
    if options.rollouts:
        return
    if options.prompts:
        rows = max(options.decode_batch // options.samples, 1) * options.samples
        devices = sharding.make_mesh(mesh, local=True)
        sharding.check_rows_divide(devices, rows, name="the responses drawn together (decode_batch),")
    check_models({"base": options.base, **rewards.reward_roles(options.reward)}, mesh, local=True)

"""Logical axes: every parameter and every cache array names its axes in one table, and rules map them to a mesh."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"transformer/embedding", ("vocab", "embed")),
    (r"transformer/lm_head", ("embed", "vocab")),
    (r"transformer/layer_\d+/attention/qkv/kernel", ("embed", "heads")),
    (r"transformer/layer_\d+/attention/qkv/bias", ("heads",)),
    (r"transformer/layer_\d+/attention/out/kernel", ("heads", "embed")),
    (r"transformer/layer_\d+/attention/[qk]_norm/scale", (None,)),
    (r"transformer/layer_\d+/gate_up/kernel", ("embed", "mlp")),
    (r"transformer/layer_\d+/gate_up/bias", ("mlp",)),
    (r"transformer/layer_\d+/down/kernel", ("mlp", "embed")),
    (r"transformer/(layer_\d+/)?(attention/out|down)/bias", ("embed",)),
    (r"transformer/layer_\d+/(attention|mlp)_norm/scale", ("embed",)),
    (r"transformer/norm/scale", ("embed",)),
    (r"(lora/)?layer_\d+/(attention/qkv|gate_up)/a", ("embed", None)),
    (r"(lora/)?layer_\d+/attention/qkv/b", (None, "heads")),
    (r"(lora/)?layer_\d+/gate_up/b", (None, "mlp")),
    (r"(lora/)?layer_\d+/attention/out/a", ("heads", None)),
    (r"(lora/)?layer_\d+/down/a", ("mlp", None)),
    (r"(lora/)?layer_\d+/(attention/out|down)/b", (None, "embed")),
    (r"head/(score|outer|inner(_\d+)?)/kernel", ("embed", None)),
    (r"head/(outer|inner(_\d+)?)/bias", (None,)),
    (r"layers/\d+/[kv]", ("batch", "kv_heads", "length", None)),
    (r"length", ("batch",)),
)
"""Path pattern (whole path) -> the logical name of each axis."""

RULES: Mapping[str, str | None] = {"batch": "data"}
"""Logical axis -> mesh axis. Axes without a rule are replicated: fsdp and tensor axes are entries to come."""


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as a/b/c."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str) -> tuple[str | None, ...]:
    """The logical axes of the parameter or cache array at a path. ValueError for a path that the table lacks."""
    for pattern, axes in AXES:
        if re.fullmatch(pattern, path):
            return axes
    raise ValueError(f"axes: no entry of the table names {path!r}")


def partition_spec(path: str, rules: Mapping[str, str | None] = RULES) -> PartitionSpec:
    """The PartitionSpec of an array under `rules`."""
    axes = [rules.get(axis) if axis is not None else None for axis in logical_axes(path)]
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call, unused-ignore]


def check_mesh(mesh: Mesh | None) -> None:
    """ValueError for what is neither None nor a `jax.sharding.Mesh` with Auto axes.

    Explicit axes are what `jax.make_mesh` gives by default; a scatter into a cache whose rows are split has no rule
    there. `jax.sharding.Mesh(devices, names)` has Auto axes.
    """
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh: expected a jax.sharding.Mesh, found {type(mesh).__name__}")
    explicit = [str(kind) for kind in getattr(mesh, "axis_types", ()) if "Explicit" in str(kind)]
    if explicit:
        raise ValueError(f"mesh: expected Auto axes, as of jax.sharding.Mesh(devices, names), found {explicit}")


def shard(tree: Any, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """Places parameters or a cache on a mesh by the table of logical axes.

    Args:
      tree: the model's parameters or its cache.
      mesh: a mesh with Auto axes.
      rules: logical axis -> mesh axis; mesh axes that the mesh lacks count as replicated.

    Raises:
      ValueError: another mesh (`check_mesh`), a rule for an unknown logical axis, or an array that the table lacks.
    """
    check_mesh(mesh)
    known = {axis for _, axes in AXES for axis in axes if axis is not None}
    if set(rules) - known:
        raise ValueError(f"rules: expected logical axes of {sorted(known)}, found {sorted(set(rules) - known)}")
    present = {logical: axis for logical, axis in rules.items() if axis in mesh.axis_names}

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, partition_spec(path_name(path), present)))

    return jax.tree_util.tree_map_with_path(place, tree)


def make_mesh(spec: str) -> jax.sharding.Mesh | None:
    """Makes a mesh of a command line's option.

    Args:
      spec: "data=N", N devices along the data axis, or "" for none.

    Raises:
      ValueError: another form, or more devices than there are.
    """
    if not spec:
        return None
    name, _, count = spec.partition("=")
    if name != "data" or not count.isdigit() or int(count) < 1:
        raise ValueError(f"mesh: expected data=N with N >= 1, found {spec!r}")
    if int(count) > len(jax.devices()):
        raise ValueError(f"mesh: expected at most {len(jax.devices())} devices, found {spec!r}")
    return jax.sharding.Mesh(np.asarray(jax.devices()[: int(count)]), ("data",))

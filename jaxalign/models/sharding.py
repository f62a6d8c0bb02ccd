"""Where arrays lie on a mesh of devices: parameters and caches name their logical axes in one table, and rules map
these to the mesh's axes: "data" (rows), "fsdp" (rows, and the parameters' embed axis) and "tensor" (heads, columns of
the MLP, the vocabulary)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign import _devices, _hosts
from jaxalign.types import Array

T = TypeVar("T")
Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]

MESH_AXES = ("data", "fsdp", "tensor")
"""The axes of a mesh that `make_mesh` makes, neighbouring devices along the last."""

AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"transformer/embedding", ("vocab", "embed")),
    (r"transformer/positions", (None, None)),  # small, and its gathered rows would have to be exchanged
    (r"transformer/lm_head", ("embed", "vocab")),
    (r"transformer/layer_\d+/attention/qkv/kernel", ("embed", "kv_heads", None, None)),
    (r"transformer/layer_\d+/attention/out/kernel", ("heads", "embed")),
    (r"transformer/layer_\d+/gate_up/kernel", ("embed", None, "mlp")),
    (r"transformer/layer_\d+/down/kernel", ("mlp", "embed")),
    (r"transformer/layer_\d+/experts/router", ("embed", None)),
    (r"transformer/layer_\d+/experts/gate_up", (None, "embed", None, "mlp")),
    (r"transformer/layer_\d+/experts/down", (None, "mlp", "embed")),
    (r"transformer/(layer_\d+/)?(attention/(qkv|out)|gate_up|down)/bias", (None,)),
    (r"transformer/(layer_\d+/)?((attention|mlp)_(post_)?norm|norm|attention/[qk]_norm)/(scale|bias)", (None,)),
    (r"(lora/)?layer_\d+/(attention/qkv|gate_up)/a", ("embed", None)),
    (r"(lora/)?layer_\d+/attention/qkv/b", (None, "kv_heads", None, None)),
    (r"(lora/)?layer_\d+/gate_up/b", (None, None, "mlp")),
    (r"(lora/)?layer_\d+/attention/out/a", ("heads", None)),
    (r"(lora/)?layer_\d+/down/a", ("mlp", None)),
    (r"(lora/)?layer_\d+/(attention/out|down)/b", (None, "embed")),
    (r"head/score/kernel", ("embed", None)),
    (r"head/inner/kernel", ("embed", None)),
    (r"head/inner_\d+/kernel", (None, None)),
    (r"head/outer/kernel", ("head_in", "head_out")),
    (r"head/(outer|inner(_\d+)?)/bias", (None,)),
    (r"head/tokens", ("vocab", None)),
    (r"head/own", (None,)),
    (r"layers/\d+/[kv]", ("batch", "kv_heads", "length", None)),
    (r"length", ("batch",)),
)
"""Path pattern (whole path) -> the logical name of each axis. Vectors are replicated: they are small."""

RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_in": "fsdp",
    "head_out": "tensor",
}
"""Logical axis -> mesh axis, or several. Axes without a rule are replicated."""

REPLICATED_WHERE_ODD = ("kv_heads", "head_in", "head_out")
"""Logical axes that are replicated where their size does not divide over the devices, which one line tells: a model may
have fewer heads of keys and values than a mesh has devices."""


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as a/b/c."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str) -> tuple[str | None, ...]:
    """The logical axes of the parameter or cache array at a path, also behind other names, as in an optimizer's state
    ("opt_state/mu/transformer/embedding"). ValueError for a path that the table lacks."""
    found = _known_axes(path)
    if found is None:
        raise ValueError(f"axes: no entry of the table names {path!r}")
    return found


@functools.cache
def _known_axes(path: str) -> tuple[str | None, ...] | None:
    return next((axes for pattern, axes in AXES if re.fullmatch(rf"(?:.*/)?(?:{pattern})", path)), None)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """How an array is split over a mesh.

    Args:
      path: of a parameter or cache array.
      shape: its axes; one more in front than the table has (stacked adapters) is not split.
      mesh: whose axes the rules name; those that it lacks count as one device.
      rules: logical axis -> mesh axis.

    Raises:
      ValueError: a path that the table lacks, or an axis that does not divide over its devices; the parameter, axis,
        size and devices are named.
    """
    names = logical_axes(path)
    names = (*(None,) * (len(shape) - len(names)), *names)
    spec = []
    for name, size in zip(names, shape, strict=True):
        axes = () if name is None else present_axes(mesh, rules.get(name))
        devices = size_of(mesh, axes)
        if size % devices and name in REPLICATED_WHERE_ODD:
            # Without the path: weights, both moments, an adapter and each layer's cache are of one size.
            _tell_once(f"mesh: {name} of size {size} does not divide over {named_sizes(mesh, axes)}: replicated")
            axes = ()
        elif size % devices:
            raise ValueError(
                f"{path}: expected axis {name} to divide over {named_sizes(mesh, axes)} devices, found size {size}"
            )
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)  # type: ignore[no-untyped-call, unused-ignore]


@functools.cache
def _tell_once(line: str) -> None:
    print(line, flush=True)


def present_axes(mesh: Mesh, rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of a rule that a mesh has, those of one device left out."""
    names = (rule,) if isinstance(rule, str) else rule or ()
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def size_of(mesh: Mesh, axes: tuple[str, ...]) -> int:
    """The number of devices along some axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def is_split(mesh: Mesh | None, axis: str) -> bool:
    """Whether an axis of a mesh has several devices."""
    return mesh is not None and mesh.shape.get(axis, 1) > 1


def named_sizes(mesh: Mesh, axes: tuple[str, ...]) -> str:
    """ "data=2,fsdp=4", for messages."""
    return ",".join(f"{axis}={mesh.shape[axis]}" for axis in axes)


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


def placements(tree: Any, mesh: Mesh, rules: Rules = RULES, *, others: bool = False) -> Any:
    """Gives the place of every array by the table of logical axes.

    Args:
      tree: parameters, a cache, or a state that holds such; arrays or their shapes (`jax.eval_shape`).
      mesh: a mesh with Auto axes.
      rules: logical axis -> mesh axis; mesh axes that the mesh lacks count as replicated.
      others: whether an array that the table does not name is replicated, as a state's counters are.

    Returns:
      A tree of NamedSharding.

    Raises:
      ValueError: another mesh (`check_mesh`), a rule for an unknown logical axis, an array that the table lacks, or an
        axis that does not divide (`partition_spec`).
    """
    check_mesh(mesh)
    known = {axis for _, axes in AXES for axis in axes if axis is not None}
    if set(rules) - known:
        raise ValueError(f"rules: expected logical axes of {sorted(known)}, found {sorted(set(rules) - known)}")

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, shape = path_name(path), np.shape(leaf)
        axes = _known_axes(name)
        if others and (axes is None or len(axes) not in (len(shape), len(shape) - 1)):
            return NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call, unused-ignore]
        return NamedSharding(mesh, partition_spec(name, shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def shard(tree: T, mesh: Mesh, rules: Rules = RULES, *, others: bool = False) -> T:
    """Places parameters, a cache or a state on a mesh: Args and errors as in `placements`."""
    return _hosts.put(tree, placements(tree, mesh, rules, others=others))


def constrain(tree: T, mesh: Mesh | None, rules: Rules = RULES) -> T:
    """The arrays of a traced function where `shard(…, others=True)` would put them; as they are without a mesh."""
    if mesh is None:
        return tree
    held: T = jax.lax.with_sharding_constraint(tree, placements(tree, mesh, rules, others=True))
    return held


def hold(x: Array, mesh: Mesh | None, *names: str | None, gather: tuple[str, ...] = ()) -> Array:
    """An array of a traced function with each axis where the rules say, which the partitioner else has to guess.

    Args:
      x: the array.
      mesh: None: x is given back.
      names: the logical name of each axis; None is not split. An axis that does not divide is left to the partitioner.
      gather: mesh axes over which the array is put together, as a layer's weights are from their shards.
    """
    if mesh is None:
        return x
    spec: list[Any] = []
    for name, size in zip(names, x.shape, strict=True):
        axes = tuple(a for a in present_axes(mesh, None if name is None else RULES[name]) if a not in gather)
        divides = size % size_of(mesh, axes) == 0
        spec.append((axes or None) if divides else PartitionSpec.UNCONSTRAINED)
    held: Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
    return held


def check_sizes(mesh: Mesh, axis: str, sizes: Mapping[str, int]) -> None:
    """ValueError that names the first of some sizes of a model that does not divide over an axis of a mesh."""
    for name, size in sizes.items():
        if size % mesh.shape.get(axis, 1):
            raise ValueError(
                f"{name}: expected a multiple of the mesh's {axis}={mesh.shape[axis]} devices, found {size}"
            )


def batch_sharding(mesh: Mesh, *, ahead: int = 0) -> NamedSharding:
    """Arrays whose rows are shared by the data and fsdp axes; `ahead` axes come before that of the rows."""
    spec = PartitionSpec(*(None,) * ahead, present_axes(mesh, RULES["batch"]))  # type: ignore[no-untyped-call, unused-ignore]
    return NamedSharding(mesh, spec)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree's arrays lie on; None where no array lies on one."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)


def row_devices(mesh: Mesh | None) -> int:
    """Among how many devices the rows of a batch are divided: data × fsdp."""
    return 1 if mesh is None else size_of(mesh, present_axes(mesh, RULES["batch"]))


def check_rows_divide(mesh: Mesh | None, rows: int, *, name: str) -> None:
    """ValueError where a batch of `rows` rows does not divide over a mesh; name: what gives their number."""
    if mesh is not None and rows % row_devices(mesh):
        sizes = named_sizes(mesh, present_axes(mesh, RULES["batch"]))
        raise ValueError(f"mesh: expected sizes of data and fsdp whose product divides {name} {rows}, found {sizes}")


def make_mesh(spec: str, *, local: bool = False) -> Mesh | None:
    """Makes a mesh of a command line's option.

    Args:
      spec: sizes of some of the axes data, fsdp and tensor, as in "data=2,fsdp=4"; -1 stands for the rest of the
        devices, once. Fewer devices than there are may be used, of one process. "" for no mesh.
      local: of several processes, this one's part of that mesh: each works on rows of its own. The sizes are divided by
        the number of processes, data first.

    Raises:
      ValueError: another form, or sizes that the devices do not give; the axis is named. Of several processes, a mesh
        that leaves out devices, or none where `local` is not set.
    """
    if not spec:
        if _hosts.count() > 1 and not local:
            raise ValueError(
                f"mesh: expected one of all {len(jax.devices())} devices of the {_hosts.count()} processes, as in "
                f"data={len(jax.devices())}, found none"
            )
        return None
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        name, _, count = (text.strip() for text in part.partition("="))
        if name not in MESH_AXES:
            raise ValueError(f"mesh: expected axes of {MESH_AXES}, as in data=2,fsdp=4, found {part!r} in {spec!r}")
        if name in sizes:
            raise ValueError(f"mesh: {name}: expected one size, found two in {spec!r}")
        if not re.fullmatch(r"-1|[1-9]\d*", count):
            raise ValueError(f"mesh: {name}: expected a size >= 1, or -1 for the rest, found {count!r} in {spec!r}")
        sizes[name] = int(count)
    devices = _devices.every()
    rest = [name for name, size in sizes.items() if size == -1]
    product = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1:
        raise ValueError(f"mesh: expected -1 for one axis at most, found it for {' and '.join(rest)}")
    if rest and len(devices) % product:
        expected = f"other sizes whose product divides {len(devices)} devices"
        raise ValueError(f"mesh: {rest[0]}: expected {expected}, found {product} in {spec!r}")
    if rest:
        sizes[rest[0]] = len(devices) // product
    elif product > len(devices):
        raise ValueError(f"mesh: expected at most {len(devices)} devices, found {product} in {spec!r}")
    names = tuple(name for name in MESH_AXES if name in sizes)
    if _hosts.count() > 1:
        sizes, devices = _among_processes({name: sizes[name] for name in names}, spec, local=local)
    shape = tuple(sizes[name] for name in names)
    return Mesh(np.asarray(devices[: math.prod(shape)]).reshape(shape), names)


def _among_processes(sizes: dict[str, int], spec: str, *, local: bool) -> tuple[dict[str, int], list[jax.Device]]:
    """(sizes, devices) of a mesh over several processes, or of this process's part of it: the axes are divided by the
    number of processes, rows first. ValueError for a mesh that leaves out devices, or does not divide."""
    count, devices = _hosts.count(), jax.devices()
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh: expected all {len(devices)} devices of the {count} processes, found {math.prod(sizes.values())} "
            f"in {spec!r}"
        )
    if not local:
        return sizes, devices
    part, left = dict(sizes), count
    for name, size in sizes.items():
        common = math.gcd(size, left)
        part[name], left = size // common, left // common
    if left > 1 or math.prod(part.values()) != len(jax.local_devices()):
        raise ValueError(f"mesh: expected sizes that {count} processes divide, found {spec!r}")
    return part, jax.local_devices()

"""The tensors of a checkpoint as our parameters, and back: safetensors files, whole or in shards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts
from jaxalign.models import sharding
from jaxalign.models.checks import named
from jaxalign.models.config import Config
from jaxalign.models.families import (
    FAMILIES,
    Rule,
    fuse,
    fused_shape,
    is_harmless,
    packed,
    split_sizes,
    stack_experts,
    unfuse,
    unpacked,
    unstack_experts,
    write_out,
)
from jaxalign.models.hf import weights
from jaxalign.models.hf.files import naming_file, tell
from jaxalign.models.hf.weight_files import tensor_files, with_prefix
from jaxalign.models.hf.writing import Planned, write_tensors
from jaxalign.models.language_model import LanguageModel
from jaxalign.types import Params

BLOCK = 1 << 20
"""Numbers that are read and converted together."""

Index: TypeAlias = tuple[slice, ...]
Read: TypeAlias = Callable[[str, Index], np.ndarray]
"""(name of a tensor, the part that is wanted) -> that part."""
Product: TypeAlias = tuple[jax.Array, jax.Array, float]


def rules_of(config: Config) -> list[Rule]:
    """The table between our parameters and a checkpoint's tensors. ValueError for a family that is not known."""
    if config.family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, found {config.family!r}")
    return write_out(FAMILIES[config.family], config)


class Edits(NamedTuple):
    """What adapters make of a checkpoint's tensors while they are read."""

    products: Mapping[str, Sequence[Product]] = {}
    """Name of a tensor [out,in] -> (A [r,in], B [out,r], scale) of each adapter; scale·B·A is added in float32."""
    replaced: Mapping[str, jax.Array] = {}
    """Name of a tensor -> what stands in its place; the checkpoint need not hold it."""


@functools.lru_cache(maxsize=8)
def shapes_of(lm: LanguageModel) -> Any:
    """The tree of a model's parameters as shapes."""
    return jax.eval_shape(lm.init, jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Stored:
    """One of our arrays that lies in a folder's files until it is read."""

    shape: tuple[int, ...]
    """Its shape."""
    dtype: jnp.dtype[Any]
    """The type that it is read in."""
    part: Callable[[Index | None], np.ndarray]
    """Reads a part, or all."""


def read_params(
    folder: pathlib.Path,
    lm: LanguageModel,
    edits: Edits = Edits(),  # noqa: B008
    *,
    check_finite: bool = True,
) -> Params:
    """The parameters of a folder's safetensors, with the edits of adapters, in the model's dtype and on its mesh. Array
    by array, and of each what this machine's devices hold: neither the model nor the sum of its files is in memory."""
    with stored_params(folder, lm, edits, check_finite=check_finite) as found:
        return jax.tree_util.tree_map_with_path(lambda path, x: _placed(lm, sharding.path_name(path), x), found)


@contextlib.contextmanager
def stored_params(
    folder: pathlib.Path, lm: LanguageModel, edits: Edits, *, check_finite: bool = True
) -> Iterator[Params]:
    """The parameters of a folder's safetensors as a tree of `Stored` arrays, which can be read while this is open.
    check_finite: whether NaN and infinities raise when they are read, as they are in the model."""
    table, family = rules_of(lm.config), FAMILIES[lm.config.family]
    wanted = [key for rule in table for key in rule.theirs]
    files = with_prefix(tensor_files(folder), family.prefix, wanted)
    missing = [key for key in wanted if key not in files and key not in edits.replaced]
    surplus = [key for key in sorted(set(files) - set(wanted)) if not is_harmless(family, lm.config, key)]
    surplus += sorted((set(edits.products) | set(edits.replaced)) - set(wanted))
    if not lm.has_lm_head and family.lm_head in surplus and family.lm_head not in edits.replaced:
        surplus.remove(family.lm_head)
        if "score.weight" not in edits.replaced:  # an adapter's score stands on a language model, which has one
            tell(f"{folder}: {family.lm_head} is passed over: a sequence classifier has no logits")
    if missing or surplus:
        raise ValueError(
            f"tensors of {folder}: expected those of a {lm.config.family} model with head {lm.config.head}, found "
            f"missing {named(missing)}; surplus {named(surplus)}"
        )
    shapes = shapes_of(lm)
    flat: dict[str, Any] = {sharding.path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    if sorted(flat) != sorted(rule.ours for rule in table):
        raise AssertionError("jaxalign.models.families and the transformer name different parameters")
    if lm.mesh is not None:
        sharding.placements(shapes, lm.mesh)  # what does not divide is named before anything is read
    with contextlib.ExitStack() as stack:
        handles = {
            file: stack.enter_context(weights.open_tensors(file)) for file in sorted({f for f, _ in files.values()})
        }

        def shape_of(key: str) -> tuple[int, ...]:
            if key in edits.replaced:
                return tuple(edits.replaced[key].shape)
            return handles[files[key][0]].shape(files[key][1])

        def part_of(key: str, index: Index) -> np.ndarray:
            if key in edits.replaced:
                return np.asarray(np.asarray(edits.replaced[key])[index])
            file, name = files[key]
            return np.asarray(handles[file].read(name, index))

        def stored(rule: Rule) -> Stored:
            shape = flat[rule.ours].shape
            for key, expected in zip(rule.theirs, their_shapes(lm.config, rule, shape), strict=True):
                with naming_file(files[key][0] if key in files else folder):
                    _check_shape(key, shape_of(key), expected, edits.products.get(key, ()), rule.transpose)

            def read(key: str, index: Index) -> np.ndarray:
                return _added(part_of(key, index), index, edits.products.get(key, ()), rule.transpose)

            def blame(key: str, index: Index) -> np.ndarray:
                """What `read` gives; ValueError where that is not finite, which says what made it so."""
                part, path = part_of(key, index), files[key][0] if key in files else folder
                weights.check_finite(part, files[key][1] if key in files else key, path)
                made = f" as {lm.dtype}" + " with its adapters" * (key in edits.products or key in edits.replaced)
                weights.check_finite(read(key, index).astype(jnp.dtype(lm.dtype)), key, path, made=made)
                return part

            part = functools.partial(_part, lm, rule, shape, read, blame if check_finite else None)
            return Stored(shape, jnp.dtype(lm.dtype), part)

        found = {rule.ours: stored(rule) for rule in table}
        yield jax.tree_util.tree_map_with_path(lambda path, _: found[sharding.path_name(path)], shapes)


def _placed(lm: LanguageModel, name: str, array: Stored) -> jax.Array:
    """One of our arrays on the model's devices: each gets what it holds, which is read once."""
    if lm.mesh is None:
        placed: jax.Array = jax.device_put(array.part(None))
        return placed
    kept: dict[str, np.ndarray] = {}

    def once(index: Index | None) -> np.ndarray:
        if str(index) not in kept:
            kept[str(index)] = array.part(index)
        return kept[str(index)]

    spec = sharding.partition_spec(name, array.shape, lm.mesh)
    return jax.make_array_from_callback(array.shape, jax.sharding.NamedSharding(lm.mesh, spec), once)


def _part(
    lm: LanguageModel, rule: Rule, shape: tuple[int, ...], read: Read, blame: Read | None, index: Index | None
) -> np.ndarray:
    """A part of one of our arrays, or all, in the model's type. Where it is not finite, it is read with `blame`."""
    whole = tuple(
        slice(*one.indices(size)) for one, size in zip(index or (slice(None),) * len(shape), shape, strict=True)
    )
    out = np.empty([one.stop - one.start for one in whole], jnp.dtype(lm.dtype))
    # What overflows is named, or wanted as it is.
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _blocks(rule, whole):
            place = tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(block, whole, strict=True))
            found = read_part(lm.config, rule, shape, block, read)
            out[place] = found
            narrower = jnp.finfo(out.dtype).max < jnp.finfo(found.dtype).max
            if blame is not None and not weights.is_finite(out[place] if narrower else found):
                read_part(lm.config, rule, shape, block, blame)
                raise AssertionError(f"{rule.ours}: not finite, while each of {rule.theirs} is")
            del found  # or it is in memory beside the next
    return out


def _blocks(rule: Rule, whole: Index) -> Iterator[Index]:
    """A part of one of our arrays in blocks along the axis that is first in the checkpoint's tensors: what is read is
    in memory a second time, in the file's type, block by block alone."""
    if rule.packed or len(whole) == 1:
        yield whole
        return
    axis = {"qkv": 1, "gate_up": 2}.get(rule.sizes, len(whole) - 1) if rule.transpose or rule.sizes else 0
    span = whole[axis]
    each = math.prod(one.stop - one.start for i, one in enumerate(whole) if i != axis)
    step = max(BLOCK // max(each, 1), 1)
    for start in range(span.start, span.stop, step):
        yield (*whole[:axis], slice(start, min(start + step, span.stop)), *whole[axis + 1 :])


def read_part(config: Config, rule: Rule, shape: tuple[int, ...], index: Index, read: Read) -> np.ndarray:
    """The part of one of our arrays at `index`, made of the parts of the checkpoint's tensors that it needs."""
    if not rule.sizes and not rule.packed:
        (key,) = rule.theirs
        return read(key, index[::-1]).T if rule.transpose else read(key, index)
    if rule.packed or len(shape) == 1:  # the order of a packed tensor is not ours, and a bias is flat
        return whole_array(config, rule, shape, read)[index]
    rows, axes = index[0], fused_shape(config, rule.sizes)
    axis = 1 if rule.sizes == "qkv" else 2  # that which devices split: heads of keys, or columns
    begin, end = index[axis].start, index[axis].stop
    parts = []
    for key, width in zip(rule.theirs, split_sizes(config, rule.sizes), strict=True):
        each = width // axes[axis - 1]
        columns = slice(begin * each, end * each)
        parts.append(read(key, (columns, rows)).T if rule.transpose else read(key, (rows, columns)))
    fused = np.asarray(fuse(config, rule.sizes, parts))
    return fused[tuple(slice(None) if i in (0, axis) else one for i, one in enumerate(index))]


def whole_array(config: Config, rule: Rule, shape: tuple[int, ...], read: Read) -> np.ndarray:
    """One of our arrays from the whole of the checkpoint's tensors."""
    parts = [read(key, (slice(None),) * (1 if len(shape) == 1 else 2)) for key in rule.theirs]
    parts = [part.T if rule.transpose else part for part in parts]
    if rule.packed == "experts":
        return np.asarray(stack_experts(config, parts))
    fused = fuse(config, rule.sizes, unpacked(config, rule, parts[0]) if rule.packed else parts)
    return np.asarray(fused).reshape(shape)


def _check_shape(
    key: str, shape: tuple[int, ...], expected: tuple[int, ...], products: Sequence[Product], transpose: bool
) -> None:
    """ValueError for a tensor of another shape than the config says, or its adapter."""
    for a, b, _ in products:
        adapted = (b.shape[0], a.shape[1]) if transpose else (a.shape[1], b.shape[0])
        if shape != adapted:
            raise ValueError(f"{key}: expected shape {adapted} as its adapter has it, found {shape}")
    if shape != expected:
        raise ValueError(f"{key}: expected shape {expected}, found {shape}")


def _added(tensor: np.ndarray, index: Index, products: Sequence[Product], transpose: bool) -> np.ndarray:
    """A part of a checkpoint's tensor and of the products of adapters, summed in float32; the tensor is [out,in] as
    they are, or [in,out] where our own is not its transpose."""
    for a, b, scale in products:
        wide = np.float64 if tensor.dtype == np.float64 else np.float32
        out, inside = index if transpose else index[::-1]
        low = np.asarray(b[out], wide) @ np.asarray(a[:, inside], wide)
        tensor = tensor.astype(wide) + scale * (low if transpose else low.T)
    return tensor


def theirs_widths(config: Config, rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The widths of a rule's tensors along their output."""
    if not rule.sizes:
        return shape[-1:]
    widths = split_sizes(config, rule.sizes)
    return (sum(widths),) if rule.packed else widths


def their_shapes(config: Config, rule: Rule, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape of each of the checkpoint's tensors that one of our arrays is made of."""
    if rule.packed == "experts":
        widths, ahead = shape[-1:] * len(rule.theirs), shape[1:2]
    else:  # a bias is flat
        widths, ahead = theirs_widths(config, rule, shape), shape[: len(shape) > 1] if rule.sizes else shape[:-1]
    return [(*ahead, width)[::-1] if rule.transpose else (*ahead, width) for width in widths]


def write_params(folder: pathlib.Path, lm: LanguageModel, params: Params) -> None:
    """Writes parameters as a checkpoint's tensors; each is fetched from its devices when its turn comes.

    ValueError: parameters that are not this model's, naming them."""
    flat = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    rules = {rule.ours: rule for rule in rules_of(lm.config)}
    plan = []
    for rule in rules.values():
        array = flat[rule.ours]
        shapes = their_shapes(lm.config, rule, array.shape)
        dtype = str(jnp.dtype(array.dtype).name)
        plan += [Planned(key, shape, dtype, rule.ours) for key, shape in zip(rule.theirs, shapes, strict=True)]

    write_tensors(folder, plan, lambda ours: _fetched(lm.config, rules[ours], flat[ours]))


def _fetched(config: Config, rule: Rule, ours: jax.Array | Stored) -> dict[str, np.ndarray]:
    """The checkpoint's tensors of one of our arrays, on the host."""
    array = ours.part(None) if isinstance(ours, Stored) else _on_host(ours)
    parts: list[Any] = [array]
    if rule.packed == "experts":
        parts = list(unstack_experts(array))
    elif rule.sizes:  # a bias is flat
        parts = unfuse(
            config, rule.sizes, array.reshape(*array.shape[: array.ndim > 1], *fused_shape(config, rule.sizes))
        )
        parts = [packed(config, rule, parts)] if rule.packed else parts
    return {key: np.asarray(part.T if rule.transpose else part) for key, part in zip(rule.theirs, parts, strict=True)}


def _on_host(array: Any) -> np.ndarray:
    """An array on the host. A jax.Array keeps what was once fetched of it, so others of the same buffers are asked:
    after all arrays the host would else hold the model."""
    if not isinstance(array, jax.Array) or _hosts.is_spread(array):
        return np.asarray(_hosts.host_value(array))
    out = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            data = shard.data
            out[shard.index] = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
    return out


def fetch_all(lm: LanguageModel, params: Params) -> None:
    """Takes part in what `write_params` fetches, on a process that writes nothing: in the same order, each once."""
    flat = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for rule in rules_of(lm.config):
        if _hosts.is_spread(flat[rule.ours]):
            _hosts.host_value(flat[rule.ours])


def check_params(lm: LanguageModel, params: Params) -> None:
    """ValueError for parameters that are not this model's, naming them."""
    flat = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = jax.tree_util.tree_leaves_with_path(shapes_of(lm))
    expected = {sharding.path_name(path): leaf.shape for path, leaf in shapes}
    if set(flat) != set(expected):
        raise ValueError(
            f"params: missing {named(sorted(set(expected) - set(flat)))}; "
            f"surplus {named(sorted(set(flat) - set(expected)))}"
        )
    for name, shape in expected.items():
        if flat[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {flat[name].shape}")

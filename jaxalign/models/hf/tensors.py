"""The tensors of a checkpoint as our parameters, and back: safetensors files, whole or in shards."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from safetensors import safe_open
from safetensors.flax import save_file

from jaxalign._arrays import at_least_float32
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
from jaxalign.models.hf.files import read_json, tell, write_json
from jaxalign.models.language_model import LanguageModel
from jaxalign.types import Params

SHARD_BYTES = 4 << 30
"""Largest file that is written; a model beyond it is written in shards."""


def rules_of(config: Config) -> list[Rule]:
    """The table between our parameters and a checkpoint's tensors. ValueError for a family that is not known."""
    if config.family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, found {config.family!r}")
    return write_out(FAMILIES[config.family], config)


class Edits(NamedTuple):
    """What adapters make of a checkpoint's tensors while they are read."""

    products: Mapping[str, Sequence[tuple[jax.Array, jax.Array, float]]] = {}
    """Name of a tensor [out,in] -> (A [r,in], B [out,r], scale) of each adapter; scale·B·A is added in float32."""
    replaced: Mapping[str, jax.Array] = {}
    """Name of a tensor -> what stands in its place; the checkpoint need not hold it."""


WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that torch.compile, DataParallel and FSDP put around a model or its layers."""


def plain_name(key: str) -> str:
    """A tensor's name without the wrappers that training put around the model."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a folder. model.safetensors is read where an index stands beside it, as transformers
    does, and that is told."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        if index.exists():
            tell(f"{folder}: both model.safetensors and {index.name}: model.safetensors is read, the index is not")
        return [single]
    if not index.exists():
        raise ValueError(no_weights(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name}: expected a weight_map of tensors to files, found {weight_map!r} in {index}")
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{index.name}: expected its {len(files)} files in {folder}, found no {named(missing)}")
    return [folder / name for name in files]


def no_weights(folder: pathlib.Path) -> str:
    """The message for a folder without safetensors: what it holds in their place, and how that is converted."""
    expected = f"model.safetensors: expected in the folder, or its index, found neither in {folder}"
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        return expected
    architecture = (read_json(folder / "config.json").get("architectures") or ["LlamaForCausalLM"])[0]
    return (
        f"{expected} but {named(path.name for path in pickles)}, which torch pickled and which are not opened here; "
        f'where you trust them, this writes safetensors (it needs torch): python -c "import transformers as t; '
        f"t.{architecture}.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\""
    )


def _files(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
    """Plain name of a tensor -> (the file that holds it, its name there), from the files themselves: an index may say
    otherwise."""
    found: dict[str, tuple[pathlib.Path, str]] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="flax") as handle:
            for key in handle.keys():  # noqa: SIM118
                name = plain_name(key)
                if name in found and found[name][1] != key:
                    raise ValueError(f"{file}: expected one tensor {name}, found {found[name][1]} and {key}")
                found[name] = file, key
    return found


def read_params(folder: pathlib.Path, lm: LanguageModel, edits: Edits = Edits()) -> Params:  # noqa: B008
    """The parameters of a folder's safetensors, with the edits of adapters, in the model's dtype."""
    table, family = rules_of(lm.config), FAMILIES[lm.config.family]
    wanted = [key for rule in table for key in rule.theirs]
    files = _with_prefix(_files(folder), family.prefix, wanted)
    missing = [key for key in wanted if key not in files and key not in edits.replaced]
    surplus = [key for key in sorted(set(files) - set(wanted)) if not is_harmless(family, lm.config, key)]
    surplus += sorted((set(edits.products) | set(edits.replaced)) - set(wanted))
    if not lm.has_lm_head and family.lm_head in surplus and family.lm_head not in edits.replaced:
        surplus.remove(family.lm_head)
        if "score.weight" not in edits.replaced:  # an adapter's score stands on a language model, which has one
            tell(f"{folder}: {family.lm_head} is passed over: a sequence classifier has no logits")
    if missing or surplus:
        raise ValueError(
            f"tensors of {folder}: missing {named(missing)}; surplus {named(surplus)} "
            f"for a {lm.config.family} model with head {lm.config.head}"
        )
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    flat: dict[str, Any] = {sharding.path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    if sorted(flat) != sorted(rule.ours for rule in table):
        raise AssertionError("jaxalign.models.families and the transformer name different parameters")
    with contextlib.ExitStack() as stack:
        handles = {
            file: stack.enter_context(safe_open(file, "flax")) for file in sorted({f for f, _ in files.values()})
        }

        def read(key: str, transpose: bool) -> jax.Array:
            if key in edits.replaced:
                return edits.replaced[key]
            file, name = files[key]
            return _added(key, handles[file].get_tensor(name), edits.products.get(key, ()), transpose)

        for rule in table:
            parts = [read(key, rule.transpose) for key in rule.theirs]
            flat[rule.ours] = _join(lm.config, rule, parts, flat[rule.ours].shape).astype(lm.dtype)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[sharding.path_name(path)], shapes)


def _with_prefix(
    files: dict[str, tuple[pathlib.Path, str]], prefix: str, wanted: list[str]
) -> dict[str, tuple[pathlib.Path, str]]:
    """The files' tensors by the names of a model with a head: a file of the model without one lacks the prefix."""
    if any(name.startswith(prefix) for name in files):
        return files
    known = set(wanted)
    return {prefix + name if prefix + name in known else name: place for name, place in files.items()}


def _added(
    key: str, tensor: jax.Array, products: Sequence[tuple[jax.Array, jax.Array, float]], transpose: bool
) -> jax.Array:
    """A checkpoint's tensor and the products of adapters, summed in float32; the tensor is [out,in] as they are, or
    [in,out] where our own is not its transpose."""
    for a, b, scale in products:
        shape = (b.shape[0], a.shape[1]) if transpose else (a.shape[1], b.shape[0])
        if tensor.shape != shape:
            raise ValueError(f"{key}: expected shape {shape} as its adapter has it, found {tensor.shape}")
        product = scale * jnp.matmul(b, a, precision="highest")
        tensor = at_least_float32(tensor) + (product if transpose else product.T)
    return tensor


def _join(config: Config, rule: Rule, parts: list[Any], shape: tuple[int, ...]) -> jax.Array:
    """One of our arrays from the checkpoint's; every part's shape is checked against the config."""
    if rule.packed == "experts":
        widths, ahead = shape[-1:] * len(parts), shape[1:2]
    else:  # a bias is flat
        widths, ahead = theirs_widths(config, rule, shape), shape[: len(shape) > 1] if rule.sizes else shape[:-1]
    for key, part, width in zip(rule.theirs, parts, widths, strict=True):
        ours = (*ahead, width)
        expected = ours[::-1] if rule.transpose else ours
        if part.shape != expected:
            raise ValueError(f"{key}: expected shape {expected}, found {part.shape}")
    parts = [part.T if rule.transpose else part for part in parts]
    if rule.packed == "experts":
        return stack_experts(config, parts)
    if not rule.sizes:
        joined: jax.Array = parts[0]
        return joined
    return fuse(config, rule.sizes, unpacked(config, rule, parts[0]) if rule.packed else parts).reshape(shape)


def theirs_widths(config: Config, rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The widths of a rule's tensors along their output."""
    if not rule.sizes:
        return shape[-1:]
    widths = split_sizes(config, rule.sizes)
    return (sum(widths),) if rule.packed else widths


def to_checkpoint(lm: LanguageModel, params: Params) -> dict[str, jax.Array]:
    flat = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lm.init, jax.random.key(0)))
    expected = {sharding.path_name(path): leaf.shape for path, leaf in shapes}
    if set(flat) != set(expected):
        raise ValueError(
            f"params: missing {named(sorted(set(expected) - set(flat)))}; "
            f"surplus {named(sorted(set(flat) - set(expected)))}"
        )
    tensors = {}
    for rule in rules_of(lm.config):
        array = flat[rule.ours]
        if array.shape != expected[rule.ours]:
            raise ValueError(f"{rule.ours}: expected shape {expected[rule.ours]}, found {array.shape}")
        if rule.packed == "experts":
            parts = unstack_experts(array)
        elif rule.sizes:  # a bias is flat
            fused = array.reshape(*array.shape[: array.ndim > 1], *fused_shape(lm.config, rule.sizes))
            parts = unfuse(lm.config, rule.sizes, fused)
            parts = [packed(lm.config, rule, parts)] if rule.packed else parts
        else:
            parts = [array]
        for key, part in zip(rule.theirs, parts, strict=True):
            tensors[key] = part.T if rule.transpose else part
    return tensors


def write_tensors(folder: pathlib.Path, tensors: dict[str, jax.Array]) -> None:
    """One file, or shards of at most SHARD_BYTES with their index, as transformers writes them."""
    shards: list[dict[str, jax.Array]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, part in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})

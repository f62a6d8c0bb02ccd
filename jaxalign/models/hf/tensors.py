"""The tensors of a checkpoint as our parameters, and back: safetensors files, whole or in shards."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

from jaxalign.models import sharding
from jaxalign.models.config import Config
from jaxalign.models.families import FAMILIES, Rule, is_harmless, split_sizes, write_out
from jaxalign.models.hf.files import read_json, write_json
from jaxalign.models.language_model import LanguageModel
from jaxalign.types import Params

SHARD_BYTES = 4 << 30
"""Largest file that is written; a model beyond it is written in shards."""


def rules_of(config: Config) -> list[Rule]:
    """The table between our parameters and a checkpoint's tensors. ValueError for a family that is not known."""
    if config.family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, found {config.family!r}")
    return write_out(FAMILIES[config.family], config)


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name -> the file that holds it, from the files themselves: an index may say otherwise."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    elif single.exists():
        files = [single]
    else:
        raise ValueError(f"model.safetensors: expected in the folder, or its index, found neither in {folder}")
    found: dict[str, pathlib.Path] = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{file.name}: expected by {index.name}, found no file {file}")
        with safe_open(file, framework="flax") as handle:
            found |= dict.fromkeys(handle.keys(), file)
    return found


def read_params(folder: pathlib.Path, lm: LanguageModel) -> Params:
    table = rules_of(lm.config)
    files = _files(folder)
    wanted = [key for rule in table for key in rule.theirs]
    missing = [key for key in wanted if key not in files]
    surplus = [key for key in sorted(set(files) - set(wanted)) if not is_harmless(lm.config, key)]
    if missing or surplus:
        raise ValueError(
            f"tensors of {folder}: missing {missing or 'none'}; surplus {surplus or 'none'} "
            f"for a {lm.config.family} model with head {lm.config.head}"
        )
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    flat: dict[str, Any] = {sharding.path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    if sorted(flat) != sorted(rule.ours for rule in table):
        raise AssertionError("jaxalign.models.families and the transformer name different parameters")
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(safe_open(file, "flax")) for file in sorted(set(files.values()))}
        for rule in table:
            parts = [handles[files[key]].get_tensor(key) for key in rule.theirs]
            flat[rule.ours] = _join(lm.config, rule, parts, flat[rule.ours].shape).astype(lm.dtype)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[sharding.path_name(path)], shapes)


def _join(config: Config, rule: Rule, parts: list[Any], shape: tuple[int, ...]) -> jax.Array:
    """One of our arrays from the checkpoint's; every part's shape is checked against the config."""
    widths = split_sizes(config, rule.sizes) if rule.sizes else shape[-1:]
    for key, part, width in zip(rule.theirs, parts, widths, strict=True):
        ours = (*shape[:-1], width)
        expected = ours[::-1] if rule.transpose else ours
        if part.shape != expected:
            raise ValueError(f"{key}: expected shape {expected}, found {part.shape}")
    return jnp.concatenate([part.T if rule.transpose else part for part in parts], axis=-1)


def to_checkpoint(lm: LanguageModel, params: Params) -> dict[str, jax.Array]:
    flat = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lm.init, jax.random.key(0)))
    expected = {sharding.path_name(path): leaf.shape for path, leaf in shapes}
    if set(flat) != set(expected):
        raise ValueError(
            f"params: missing {sorted(set(expected) - set(flat)) or 'none'}; "
            f"surplus {sorted(set(flat) - set(expected)) or 'none'}"
        )
    tensors = {}
    for rule in rules_of(lm.config):
        array = flat[rule.ours]
        if array.shape != expected[rule.ours]:
            raise ValueError(f"{rule.ours}: expected shape {expected[rule.ours]}, found {array.shape}")
        widths = split_sizes(lm.config, rule.sizes) if rule.sizes else array.shape[-1:]
        parts = jnp.split(array, np.cumsum(widths)[:-1].tolist(), axis=-1)
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

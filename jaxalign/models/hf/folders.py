"""Hugging Face folders in and out: config.json, safetensors, tokenizer files, generation_config.json.

No torch, no pickle, no code from the folder. Nothing is downloaded unless a hub name ("owner/model") is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

from jaxalign.models import sharding
from jaxalign.models.config import Config
from jaxalign.models.families.rules import Rule, harmless, rules, split_sizes
from jaxalign.models.hf.config import id_set
from jaxalign.models.language_model import LanguageModel
from jaxalign.types import Params

SHARD_BYTES = 4 << 30


def load(
    path: str | pathlib.Path, *, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> tuple[LanguageModel, Params]:
    """(lm, params) of a folder, or of a model on the hub by its name.

    Args:
      path: a folder with config.json and model.safetensors (or its index and shards), or "owner/model".
      dtype: of the parameters, whatever the files hold.
      mesh: places the parameters by the table of logical axes.

    Raises:
      ValueError: an unsupported field of config.json; tensors that are missing, surplus or misshapen, by name; a file
        that is missing, by path.
    """
    folder = _folder(path)
    if dtype == "float64" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError("dtype: expected float64 under jax.enable_x64, found it off")
    config = Config.from_hf(read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = id_set(read_json(generation).get("eos_token_id"))
        config = dataclasses.replace(config, eos_ids=eos or config.eos_ids)
    lm = LanguageModel(config, dtype)
    params = _read_params(folder, lm)
    return lm, params if mesh is None else sharding.shard(params, mesh)


def save(
    path: str | pathlib.Path, lm: LanguageModel, params: Params, *, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Writes a folder that `load` and transformers read. `tokenizer` (transformers') is saved beside.

    Written under a temporary name and renamed: a folder under the target's name is whole, the old one or the new.
    ValueError for parameters that are not this model's, and when the target holds files and `overwrite` is False.
    """
    tensors = _to_checkpoint(lm, params)
    values = lm.config.to_hf() | {"dtype": lm.dtype}
    with whole_folder(path, overwrite=overwrite) as temporary:
        write_json(temporary / "config.json", values)
        generation = {"eos_token_id": values["eos_token_id"], "bos_token_id": values["bos_token_id"]}
        write_json(temporary / "generation_config.json", generation | {"pad_token_id": values["pad_token_id"]})
        _write_tensors(temporary, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


@contextlib.contextmanager
def whole_folder(path: str | pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """A temporary folder to write to, renamed to `path` at the end: what stands there is whole, old or new.
    ValueError when the target is a file, or holds files and `overwrite` is False."""
    target = pathlib.Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"path: expected a folder, found a file {target}")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"path: expected a new or empty folder, found files in {target} (overwrite=True replaces it)")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def tokenizer(path: str | pathlib.Path) -> Any:
    """The folder's tokenizer, a transformers tokenizer."""
    from transformers import AutoTokenizer  # slow to import, and only needed where text comes in

    folder = _folder(path)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"tokenizer: expected tokenizer files in the folder, found none in {folder}")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _folder(path: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not folder.parent.is_dir():
        from huggingface_hub import snapshot_download

        return pathlib.Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    raise ValueError(f"path: expected a folder with config.json and safetensors, found none at {folder}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.name}: expected in the folder, found no file {path}")
    return json.loads(path.read_text())


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


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


def _read_params(folder: pathlib.Path, lm: LanguageModel) -> Params:
    table = rules(lm.config)
    files = _files(folder)
    wanted = [key for rule in table for key in rule.theirs]
    missing = [key for key in wanted if key not in files]
    surplus = [key for key in sorted(set(files) - set(wanted)) if not harmless(lm.config, key)]
    if missing or surplus:
        raise ValueError(
            f"tensors of {folder}: missing {missing or 'none'}; surplus {surplus or 'none'} "
            f"for a {lm.config.family} model with head {lm.config.head}"
        )
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    flat: dict[str, Any] = {sharding.path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    if sorted(flat) != sorted(rule.ours for rule in table):
        raise AssertionError("families.rules and the transformer name different parameters")
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


def _to_checkpoint(lm: LanguageModel, params: Params) -> dict[str, jax.Array]:
    flat = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lm.init, jax.random.key(0)))
    expected = {sharding.path_name(path): leaf.shape for path, leaf in shapes}
    if set(flat) != set(expected):
        raise ValueError(
            f"params: missing {sorted(set(expected) - set(flat)) or 'none'}; "
            f"surplus {sorted(set(flat) - set(expected)) or 'none'}"
        )
    tensors = {}
    for rule in rules(lm.config):
        array = flat[rule.ours]
        if array.shape != expected[rule.ours]:
            raise ValueError(f"{rule.ours}: expected shape {expected[rule.ours]}, found {array.shape}")
        widths = split_sizes(lm.config, rule.sizes) if rule.sizes else array.shape[-1:]
        parts = jnp.split(array, np.cumsum(widths)[:-1].tolist(), axis=-1)
        for key, part in zip(rule.theirs, parts, strict=True):
            tensors[key] = part.T if rule.transpose else part
    return tensors


def _write_tensors(folder: pathlib.Path, tensors: dict[str, jax.Array]) -> None:
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

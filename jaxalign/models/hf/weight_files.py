"""The safetensors files of a model's folder: which are read, and which of them holds a tensor of what name."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxalign.models.checks import named
from jaxalign.models.hf.files import read_json, tell
from jaxalign.models.hf.weights import open_tensors

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
    outside = [name for name in weight_map.values() if not _is_file_name(name)]
    if outside:
        raise ValueError(
            f"{index.name}: expected names of safetensors files in the folder, found {outside[0]!r:.200} in {index}"
        )
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{index.name}: expected its {len(files)} files in {folder}, found no {named(missing)}")
    return [folder / name for name in files]


def lacking(folder: pathlib.Path) -> str:
    """Tells what a folder lacks of a whole model.

    Args:
      folder: of the model.

    Returns:
      The first file that is not there, config.json or one of the weights; "" where there is none.
    """
    names, index = ["config.json"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        try:
            weight_map = read_json(index).get("weight_map")
        except ValueError:
            weight_map = None
        known = isinstance(weight_map, dict) and bool(weight_map) and all(map(_is_file_name, weight_map.values()))
        names += sorted(set(weight_map.values())) if isinstance(weight_map, dict) and known else [f"whole {index.name}"]
    else:
        names.append("model.safetensors")
    return next((name for name in names if not (folder / name).is_file()), "")


def _is_file_name(name: Any) -> bool:
    """Whether an index's entry is the name of a file beside it: a path may lead out of the folder."""
    short = isinstance(name, str) and len(name.encode("utf-8", "replace")) < 256
    return short and name.endswith(".safetensors") and not set(name) & set("/\\\0")


def no_weights(folder: pathlib.Path) -> str:
    """The message for a folder without safetensors: what it holds in their place, and how that is converted."""
    expected = f"model.safetensors: expected in the folder, or its index, found neither in {folder}"
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        return expected
    named_there = read_json(folder / "config.json").get("architectures")
    architecture = named_there[0] if isinstance(named_there, list) and named_there else "LlamaForCausalLM"
    if not str(architecture).isidentifier():  # it becomes a part of a command
        architecture = "AutoModelForCausalLM"
    return (
        f"{expected} but {named(path.name for path in pickles)}, which torch pickled and which are not opened here; "
        f'where you trust them, this writes safetensors (it needs torch): python -c "import transformers as t; '
        f"t.{architecture}.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\""
    )


def tensor_files(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
    """Plain name of a tensor -> (the file that holds it, its name there), from the files themselves: an index may say
    otherwise. ValueError for a tensor that two hold."""
    found: dict[str, tuple[pathlib.Path, str]] = {}
    for file in _weight_files(folder):
        with open_tensors(file) as opened:
            for key in opened.names():
                name = plain_name(key)
                other, before = found.get(name, (file, key))
                if before != key:
                    raise ValueError(f"{file}: expected one tensor {name}, found {before} and {key}")
                if other != file:
                    raise ValueError(f"{name}: expected in one file, found in {other.name} and {file.name} in {folder}")
                found[name] = file, key
    return found


def with_prefix(
    files: dict[str, tuple[pathlib.Path, str]], prefix: str, wanted: list[str]
) -> dict[str, tuple[pathlib.Path, str]]:
    """The files' tensors by the names of a model with a head: a file of the model without one lacks the prefix."""
    if any(name.startswith(prefix) for name in files):
        return files
    known = set(wanted)
    return {prefix + name if prefix + name in known else name: place for name, place in files.items()}

"""Whole models in Hugging Face folders, in and out: config.json, safetensors, generation_config.json.

No torch, no pickle, no code from the folder. Nothing is downloaded unless a hub name ("owner/model") is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.typing import DTypeLike

from jaxalign import _hosts
from jaxalign.models import sharding
from jaxalign.models.config import Config
from jaxalign.models.hf import tensors
from jaxalign.models.hf.config import config_from_hf, config_to_hf, end_ids
from jaxalign.models.hf.files import check_target, naming_file, read_json, tell, whole_folder, write_json
from jaxalign.models.hf.sources import find_source, merge_plan
from jaxalign.models.language_model import LanguageModel, dtype_name
from jaxalign.types import Params

WRITTEN = ("eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config")
"""Fields of generation_config.json that `save` writes from the model or that tell who wrote the file."""

SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
)
"""Fields of generation_config.json that change what transformers draws; they are used where that is asked for."""


def load(
    path: str | pathlib.Path,
    *,
    base: str | pathlib.Path | None = None,
    dtype: DTypeLike = "float32",
    mesh: jax.sharding.Mesh | None = None,
    check_finite: bool = True,
) -> tuple[LanguageModel, Params]:
    """Loads a model from a folder, or from the hub by its name.

    It is read array by array: no more than the largest is in memory beside what the devices hold. An adapter's folder
    gives the whole model: its base with the adapter merged in float32, likewise.

    Args:
      path: a folder with config.json and model.safetensors (or its index and shards), or "owner/model"; a folder of an
        adapter (peft's adapter_config.json), or "ADAPTER_DIR@BASE_DIR".
      base: with an adapter, the model that it changes, in place of the base that its folder names.
      dtype: of the parameters, whatever the files hold, in any form that jax takes.
      mesh: where the parameters are placed, by the table of logical axes: each device's part alone is read. The model
        keeps the mesh. None: on one device.
      check_finite: whether NaN and infinities among the weights raise: in the files, or once they are read as dtype
        and an adapter is merged.

    Returns:
      The model and its parameters.

    Raises:
      ValueError: another dtype or mesh; an unsupported field of config.json; tensors that are missing, surplus or
        misshapen, by name; a folder or file that is missing or cannot be read, by path; weights that are no numbers, by
        file and tensor; an adapter with a field that is not supported.
    """
    source, lm, edits = _opened(path, base=base, dtype=dtype, mesh=mesh, check_finite=check_finite)
    return lm, tensors.read_params(source, lm, edits, check_finite=check_finite)


def check_fits(path: str | pathlib.Path, mesh: jax.sharding.Mesh | None, *, name: str) -> None:
    """Checks by a folder's configuration alone that its model divides over a mesh.

    Args:
      path: as in `load`.
      mesh: None: nothing is checked.
      name: what the model is, for messages.

    Raises:
      ValueError: names the model, the size, the mesh's axis and the folder.
    """
    if mesh is None:
        return
    config = read_config(path)
    try:
        LanguageModel(config, "float32", mesh)
    except ValueError as error:
        raise ValueError(f"{name}: {error} in {path}") from error


@contextlib.contextmanager
def stored(
    path: str | pathlib.Path,
    *,
    base: str | pathlib.Path | None = None,
    dtype: DTypeLike = "float32",
    check_finite: bool = True,
) -> Iterator[tuple[LanguageModel, Params]]:
    """Opens a model's folder, an adapter's too, without reading its arrays.

    Args:
      path, base, dtype: as in `load`.
      check_finite: whether NaN and infinities raise when an array is read.

    Returns:
      A context of the model and a tree of `tensors.Stored`, arrays that can stand among the parameters that `save` is
      given: they are read, and adapters merged in float32, one at a time.

    Raises:
      ValueError: as `load`.
    """
    source, lm, edits = _opened(path, base=base, dtype=dtype, mesh=None, check_finite=check_finite)
    with tensors.stored_params(source, lm, edits, check_finite=check_finite) as found:
        yield lm, found


def _opened(
    path: str | pathlib.Path,
    *,
    base: str | pathlib.Path | None,
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh | None,
    check_finite: bool = True,
) -> tuple[pathlib.Path, LanguageModel, tensors.Edits]:
    """The folder of the weights, the model, and what adapters make of them."""
    name = dtype_name(dtype)
    if name == "float64" and jax.dtypes.canonicalize_dtype(name) != name:
        raise ValueError("dtype: expected float64 under jax.enable_x64, found it off")
    sharding.check_mesh(mesh)
    if not isinstance(check_finite, bool):
        raise ValueError(f"check_finite: expected True or False, found {check_finite!r}")
    source = find_source(path, base=base)
    folder = source.base
    config, edits = merge_plan(source, _config_of(folder), check_finite=check_finite)
    return folder, LanguageModel(config, name, mesh), edits


def read_config(path: str | pathlib.Path, *, base: str | pathlib.Path | None = None) -> Config:
    """Reads a folder's configuration alone.

    Args:
      path, base: as in `load`.

    Returns:
      The Config of the model that `load` gives.

    Raises:
      ValueError: as `load`, for what is not of the weights.
    """
    source = find_source(path, base=base)
    return merge_plan(source, _config_of(source.base))[0]


def _config_of(folder: pathlib.Path) -> Config:
    with naming_file(folder / "config.json"):
        config = config_from_hf(read_json(folder / "config.json"))
    if not (folder / "generation_config.json").exists():
        return config
    with naming_file(folder / "generation_config.json"):
        values = read_json(folder / "generation_config.json")
        eos = end_ids(values, config.family, config.vocab_size) or config.eos_ids
    if config.eos_ids and set(eos) != set(config.eos_ids):
        tell(
            f"{folder}: generation_config.json ends at {list(eos)}, which is used; config.json: {list(config.eos_ids)}"
        )
    further = {name: value for name, value in values.items() if name not in WRITTEN and value is not None}
    settings = [f"{name}={further[name]}" for name in SAMPLING if name in further]
    if settings:
        tell(
            f"{folder}: generation_config.json has {', '.join(settings)}, kept when the model is saved and not used "
            "(--generation-config of eval.decode and generation_config= of text.generate use them)"
        )
    return dataclasses.replace(config, eos_ids=eos, generation=json.dumps(further, sort_keys=True) if further else "")


def save(
    path: str | pathlib.Path, lm: LanguageModel, params: Params, *, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Writes a folder that `load` and transformers read.

    It is written under a temporary name and renamed: a folder under the target's name is whole, the old one or the new.

    Args:
      path: the folder.
      lm: the model.
      params: its parameters, without an adapter beside them; arrays that `hf.folders.stored` has opened are copied
        from their files.
      tokenizer: saved beside the model; a tokenizer of transformers.
      overwrite: whether a folder with files is replaced.

    Raises:
      ValueError: parameters that are not this model's, a config that its family cannot express, a folder that holds
        files without `overwrite`.
    """
    with _hosts.together():
        tensors.check_params(lm, params)
        values = config_to_hf(lm.config) | {"dtype": lm.dtype}
        if _hosts.is_first():
            check_target(pathlib.Path(path), overwrite=overwrite)
    # Every process takes its part in fetching what lies across several.
    with _hosts.together():
        if _hosts.is_first():
            _write(path, lm, params, values, tokenizer, overwrite=overwrite)
        else:
            tensors.fetch_all(lm, params)


def _write(
    path: str | pathlib.Path,
    lm: LanguageModel,
    params: Params,
    values: dict[str, Any],
    tokenizer: Any,
    *,
    overwrite: bool,
) -> None:
    with whole_folder(path, overwrite=overwrite) as temporary:
        write_json(temporary / "config.json", values)
        generation = json.loads(lm.config.generation or "{}")
        generation |= {name: values[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
        write_json(temporary / "generation_config.json", generation)
        tensors.write_params(temporary, lm, params)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)

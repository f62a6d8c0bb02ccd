"""Whole models in Hugging Face folders, in and out: config.json, safetensors, generation_config.json.

No torch, no pickle, no code from the folder. Nothing is downloaded unless a hub name ("owner/model") is given.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
from jax.typing import DTypeLike

from jaxalign.models import sharding
from jaxalign.models.config import Config
from jaxalign.models.hf import tensors
from jaxalign.models.hf.config import config_from_hf, config_to_hf, id_set
from jaxalign.models.hf.files import read_json, whole_folder, write_json
from jaxalign.models.hf.sources import find_source, merge_plan
from jaxalign.models.language_model import LanguageModel, dtype_name
from jaxalign.types import Params


def load(
    path: str | pathlib.Path,
    *,
    base: str | pathlib.Path | None = None,
    dtype: DTypeLike = "float32",
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[LanguageModel, Params]:
    """Loads a model from a folder, or from the hub by its name.

    An adapter's folder gives the whole model: its base with the adapter merged in float32, tensor by tensor.

    Args:
      path: a folder with config.json and model.safetensors (or its index and shards), or "owner/model"; a folder of an
        adapter (peft's adapter_config.json), or "ADAPTER_DIR@BASE_DIR".
      base: with an adapter, the model that it changes, in place of the base that its folder names.
      dtype: of the parameters, whatever the files hold, in any form that jax takes.
      mesh: where the parameters are placed, by the table of logical axes (`sharding.shard`); None: on one device.

    Returns:
      The model and its parameters.

    Raises:
      ValueError: another dtype or mesh; an unsupported field of config.json; tensors that are missing, surplus or
        misshapen, by name; a folder or file that is missing, by path; an adapter with a field that is not supported.
    """
    name = dtype_name(dtype)
    if name == "float64" and jax.dtypes.canonicalize_dtype(name) != name:
        raise ValueError("dtype: expected float64 under jax.enable_x64, found it off")
    sharding.check_mesh(mesh)
    source = find_source(path, base=base)
    folder = source.base
    config, edits = merge_plan(source, _config_of(folder))
    lm = LanguageModel(config, name)
    params = tensors.read_params(folder, lm, edits)
    return lm, params if mesh is None else sharding.shard(params, mesh)


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
    config = config_from_hf(read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = id_set(read_json(generation).get("eos_token_id"))
        config = dataclasses.replace(config, eos_ids=eos or config.eos_ids)
    return config


def save(
    path: str | pathlib.Path, lm: LanguageModel, params: Params, *, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Writes a folder that `load` and transformers read.

    It is written under a temporary name and renamed: a folder under the target's name is whole, the old one or the new.

    Args:
      path: the folder.
      lm: the model.
      params: its parameters, without an adapter beside them.
      tokenizer: saved beside the model; a tokenizer of transformers.
      overwrite: whether a folder with files is replaced.

    Raises:
      ValueError: parameters that are not this model's, a config that its family cannot express, a folder that holds
        files without `overwrite`.
    """
    arrays = tensors.to_checkpoint(lm, params)
    values = config_to_hf(lm.config) | {"dtype": lm.dtype}
    with whole_folder(path, overwrite=overwrite) as temporary:
        write_json(temporary / "config.json", values)
        generation = {"eos_token_id": values["eos_token_id"], "bos_token_id": values["bos_token_id"]}
        write_json(temporary / "generation_config.json", generation | {"pad_token_id": values["pad_token_id"]})
        tensors.write_tensors(temporary, arrays)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)

"""Weights of folders that say two things, or no number: named, whoever wrote the folder."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import models
from tests.fuzz import model_folders
from tests.fuzz.model_folders import ADAPTER

KEY = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path):
    model_folders.write_model(tmp_path / "model")
    return tmp_path / "model"


# One tensor, one place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_a_tensor_in_two_shards_is_named_with_both(number, tmp_path):
    model_folders.shards(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = sorted(key for key, file in index["weight_map"].items() if file == f"model-{number}.safetensors")[0]
    other = tmp_path / f"model-{1 - number}.safetensors"
    save_file(load_file(other) | {name: load_file(tmp_path / f"model-{number}.safetensors")[name] + 1}, other)
    words = rf"^{re.escape(name)}: expected in one file, found in model-0\.safetensors and model-1\.safetensors in .*"
    with pytest.raises(ValueError, match=f"{words}{re.escape(str(tmp_path))}$"):
        models.load(tmp_path)


def test_a_tensor_under_two_names_of_wrappers_is_named_with_both(model, tmp_path):
    file = model / "model.safetensors"
    arrays = load_file(file)
    save_file(arrays | {f"module.{KEY}": arrays[KEY] + 1}, file)
    with pytest.raises(ValueError, match=rf"expected one tensor {KEY}, found {KEY} and module\.{KEY}"):
        models.load(model)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    arrays = {f"{key}A.weight": np.ones((2, 8), np.float32), f"{key}B.weight": np.ones((8, 2), np.float32)}
    wrapped = f"base_model.model.module.{key.removeprefix('base_model.model.')}A.weight"
    save_file(arrays | {wrapped: np.zeros((2, 8), np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"expected one tensor {key}A.weight, found a second, .* in .*/adapter$"):
        models.read_config(adapter)

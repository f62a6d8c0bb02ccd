"""Weights of folders that say two things, or no number: named, whoever wrote the folder."""

from __future__ import annotations

import json
import re
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import models
from jaxalign.models.hf import folders
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


# Numbers --------------------------------------------------------------------------------------------------------------


def spoil(folder, value, dtype="float32", metadata=None):
    """Writes a folder's weights again, one of them with another number."""
    file = folder / "model.safetensors"
    arrays = load_file(file)
    weight = arrays[KEY].astype(jax.numpy.dtype(dtype))
    weight[1, 2] = value
    save_file(arrays | {KEY: weight}, file, metadata)


def kernel(folder, **options):
    with folders.stored(folder, **options) as (_, arrays):
        return arrays["transformer"]["layer_0"]["down"]["kernel"].part(None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("read", [models.load, kernel])
def test_a_file_that_says_that_it_is_ours_is_checked_as_others_are(read, value, model):
    spoil(model, value, metadata={"format": "pt", "writer": "jaxalign"})
    with pytest.raises(ValueError, match=rf"^{KEY}: expected finite weights, found 1 .*model\.safetensors; check_f"):
        read(model)
    assert not np.isfinite(kernel(model, check_finite=False)).all()


@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [
        (1e300, "float64", "float32"),
        (1e300, "float64", "bfloat16"),
        (1e6, "float32", "float16"),
        (1e6, "bfloat16", "float16"),
        (3.4e38, "float32", "bfloat16"),
    ],
)
@pytest.mark.parametrize("read", [models.load, kernel])
def test_a_weight_that_the_models_type_does_not_hold_is_named(read, value, stored, dtype, model):
    spoil(model, value, stored)
    words = rf"^{KEY}: expected finite weights, found 1 .* as {dtype} in .*model\.safetensors; check_finite=False"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=words):
            read(model, dtype=dtype)
        assert np.isinf(kernel(model, dtype=dtype, check_finite=False).astype(np.float32)).sum() == 1


def test_weights_of_every_type_are_taken_in_every_other(model):
    for stored in ("float64", "float32", "float16", "bfloat16"):
        spoil(model, 1.5, stored)
        for dtype in ("float32", "float16", "bfloat16"):
            assert (kernel(model, dtype=dtype) == 1.5).sum() == 1


def adapter_beside(model, a, b, **fields):
    folder = model.parent / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | fields))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    arrays = {f"{key}A.weight": np.full((2, 8), a, np.float32), f"{key}B.weight": np.full((8, 2), b, np.float32)}
    save_file(arrays, folder / "adapter_model.safetensors", {"writer": "jaxalign"})
    return folder


def test_an_adapter_that_says_that_it_is_ours_is_checked_as_others_are(model):
    adapter = adapter_beside(model, np.nan, 1.0)
    for read in (models.load, models.read_config, lambda path: models.load_adapter(path, models.load(model)[0])):
        with pytest.raises(ValueError, match=r"lora_A\.weight: expected finite weights, found 16 .*adapter_model"):
            read(adapter)


@pytest.mark.parametrize(("a", "b", "dtype"), [(3e30, 3e30, "float32"), (1e3, 1e3, "float16")])
def test_an_adapter_whose_merged_weights_are_not_finite_is_named(a, b, dtype, model):
    adapter = adapter_beside(model, a, b)
    words = rf"^model\..*\.q_proj\.weight: expected finite weights, found 64 .* as {dtype} with its adapters in "
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=words):
            models.load(adapter, dtype=dtype)


def test_whether_weights_are_checked_is_true_or_false(model):
    for read in (models.load, kernel):
        with pytest.raises(ValueError, match="check_finite: expected True or False, found None"):
            read(model, check_finite=None)


@pytest.mark.parametrize(("a", "fields"), [(1e6, {}), (1.0, {"lora_alpha": 1e-9, "alpha_pattern": {"q_proj": 1}})])
def test_an_adapter_that_the_models_type_does_not_hold_is_named(a, fields, model):
    adapter = adapter_beside(model, a, 1.0, **fields)
    lm = models.load(model, dtype="float16")[0]
    with pytest.raises(ValueError, match=r"^layer_0/attention/qkv: expected finite w.* as float16 in .*/adapter"):
        models.load_adapter(adapter, lm)


def test_saved_modules_that_the_models_type_does_not_hold_are_named(model):
    adapter = adapter_beside(model, 1.0, 1.0, modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": np.full((11, 8), 1e6, np.float32)}, file)
    with pytest.raises(ValueError, match=r"^lm_head\.weight: expected finite .*found 88 .* as float16 with its a"):
        models.load(adapter, dtype="float16")

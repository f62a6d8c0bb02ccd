"""Weights as people have them: wrapped names, left-over tensors, pickles, missing shards, two forms at once."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from jaxalign import models
from jaxalign.models.hf import writing
from tests.conftest import tiny_lm
from tests.models.make_golden import GOLDEN

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="opens a pickle with torch")


def saved(tmp_path, change=lambda t: t, head=None):
    """A tiny model's folder with changed tensors, and what it holds."""
    lm, params = tiny_lm(0, head)
    models.save(tmp_path / "model", lm, params, overwrite=True)
    file = tmp_path / "model/model.safetensors"
    save_file(change(dict(load_file(file))), file)
    return tmp_path / "model", params


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
        lambda key: key.replace("model.", "model._fsdp_wrapped_module.", 1),
    ],
)
def test_wrappers_of_training_are_left_out_of_names(wrap, tmp_path):
    folder, params = saved(tmp_path, lambda t: {wrap(key): x for key, x in t.items()})
    assert_equal(models.load(folder)[1], params)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    key = "model.norm.weight"
    folder, _ = saved(tmp_path, lambda t: t | {f"module.{key}": t[key] + 1})
    with pytest.raises(ValueError, match=r"one tensor model\.norm\.weight, found .*module\.model\.norm\.weight"):
        models.load(folder)


def test_a_left_over_lm_head_of_a_classifier_is_told_and_passed_over(tmp_path):
    folder, params = saved(tmp_path, lambda t: t | {"lm_head.weight": jnp.zeros((11, 16))}, "reward")
    with pytest.warns(UserWarning, match=r"lm_head\.weight is passed over") as told:
        found = models.load(folder)[1]
    assert len(told) == 1
    assert_equal(found, params)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "_orig_mod.model.layers.1.self_attn.rotary_emb.sin_cached",
    ],
)
def test_buffers_of_rotary_positions_are_passed_over(key, tmp_path):
    folder, params = saved(tmp_path, lambda t: t | {key: jnp.zeros(2)})
    assert_equal(models.load(folder)[1], params)


def test_an_error_names_ten_tensors_and_counts_the_rest(tmp_path):
    folder, _ = saved(tmp_path, lambda t: {f"x.{i}": jnp.zeros(1) for i in range(300)})
    with pytest.raises(ValueError, match=r"missing .* and 11 more; surplus .* and 290 more") as error:
        models.load(folder)
    assert str(error.value).count("'x.") == 10
    assert str(error.value).count("'model.") == 10


def test_a_pickle_is_named_with_the_command_that_converts_it(tmp_path):
    folder, _ = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^model\.safetensors: expected in the folder, or its index, found neither"):
        models.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\['pytorch_model\.bin'\].*python -c .*LlamaForCausalLM.*save_pretrained"):
        models.load(folder)


@needs_torch
def test_the_command_that_converts_a_pickle_does_it(tmp_path):
    import torch
    from safetensors.torch import load_file as load_torch

    folder = tmp_path / "pickled"
    shutil.copytree(GOLDEN / "llama", folder)
    torch.save(load_torch(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="python -c") as error:
        models.load(folder)
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert_equal(models.load(folder)[1], models.load(GOLDEN / "llama")[1])


def test_shards_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 4000)
    lm, params = tiny_lm(0)
    models.save(tmp_path / "model", lm, params)
    gone = sorted(path for path in (tmp_path / "model").glob("model-*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    with pytest.raises(ValueError, match=rf"index\.json: expected its .*{gone[0].name}', '{gone[1].name}'\]$"):
        models.load(tmp_path / "model")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ValueError, match=r"index\.json: expected a weight_map"):
        models.load(tmp_path / "model")


def both(tmp_path, monkeypatch):
    """A folder with shards of one model and a single file of another, whose parameters are given too."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 9000)
    lm, params = models.load(GOLDEN / "llama")
    models.save(tmp_path / "model", lm, jax.tree.map(lambda x: x + 1, params))
    shutil.copy(GOLDEN / "llama/model.safetensors", tmp_path / "model")
    return tmp_path / "model", params


def test_of_an_index_and_a_single_file_the_file_is_read_and_that_is_told(tmp_path, monkeypatch):
    folder, params = both(tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match=r"model\.safetensors is read, the index is not"):
        found = models.load(folder)[1]
    assert_equal(found, params)


@needs_torch
def test_transformers_reads_the_single_file_too(tmp_path, monkeypatch):
    import transformers

    folder, params = both(tmp_path, monkeypatch)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    norm = model.model.norm.weight.detach().float().numpy()
    np.testing.assert_array_equal(norm, params["transformer"]["norm"]["scale"])

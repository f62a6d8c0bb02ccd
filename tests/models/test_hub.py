"""Folders in and out: exact round trips, strict names and shapes, nothing half-written."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from jaxalign import models
from jaxalign.models import sharding
from jaxalign.models.hf import writing
from tests.conftest import forward, tiny_lm
from tests.models import families, make_golden


def assert_trees_identical(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_load_save_load_is_exact(name, tmp_path):
    lm, params = models.load(make_golden.GOLDEN / name)
    models.save(tmp_path / "copy", lm, params)
    again, copied = models.load(tmp_path / "copy")
    assert again == lm
    assert_trees_identical(copied, params)
    original = load_file(make_golden.GOLDEN / name / "model.safetensors")
    written = load_file(tmp_path / "copy" / "model.safetensors")
    assert original.keys() == written.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(tensor, written[key], err_msg=key)


@pytest.mark.parametrize("head", ["value", "q", "reward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_and_dtypes_round_trip(head, dtype, tmp_path):
    lm, params = tiny_lm(0, head, dtype)
    models.save(tmp_path / "model", lm, params)
    again, copied = models.load(tmp_path / "model", dtype=dtype)
    assert again == lm
    assert_trees_identical(copied, params)


def test_shards_round_trip(tmp_path, monkeypatch):
    lm, params = tiny_lm(0)
    monkeypatch.setattr(writing, "SHARD_BYTES", 4000)
    models.save(tmp_path / "model", lm, params)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    assert_trees_identical(models.load(tmp_path / "model")[1], params)
    next((tmp_path / "model").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="model-00002"):
        models.load(tmp_path / "model")


def edited(tmp_path, change) -> str:
    """A copy of the tiny folder with changed tensors."""
    lm, params = tiny_lm(0)
    folder = tmp_path / "model"
    models.save(folder, lm, params)
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    key = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"missing \['{key}'\]"):
        models.load(edited(tmp_path / "a", lambda t: t.pop(key)))
    with pytest.raises(ValueError, match=r"surplus \['model.extra.weight'\]"):
        models.load(edited(tmp_path / "b", lambda t: t.update({"model.extra.weight": jnp.zeros(3)})))
    with pytest.raises(ValueError, match=rf"{key}: expected shape \(8, 16\), found \(16, 8\)"):
        models.load(edited(tmp_path / "c", lambda t: t.update({key: t[key].T})))
    harmless = "model.layers.0.self_attn.rotary_emb.inv_freq"
    models.load(edited(tmp_path / "d", lambda t: t.update({harmless: jnp.zeros(2)})))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="path"):
        models.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        models.load(tmp_path / "empty")


def test_save_refuses_a_folder_that_exists_and_leaves_nothing_behind(tmp_path):
    lm, params = tiny_lm(0)
    models.save(tmp_path / "model", lm, params)
    with pytest.raises(ValueError, match="overwrite"):
        models.save(tmp_path / "model", lm, params)
    models.save(tmp_path / "model", lm, params, overwrite=True)
    broken = {**params, "extra": jnp.zeros(1)}
    with pytest.raises(ValueError, match="surplus"):
        models.save(tmp_path / "other", lm, broken)

    class Broken:
        def save_pretrained(self, folder):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        models.save(tmp_path / "other", lm, params, tokenizer=Broken())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_generation_config_wins_over_config_for_eos(tmp_path):
    lm, params = tiny_lm(0)
    models.save(tmp_path / "model", lm, params)
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 4]}))
    with pytest.warns(UserWarning, match=r"ends at \[3, 4\], which is used; config.json: "):
        loaded, _ = models.load(tmp_path / "model")
    assert loaded.config.eos_ids == (3, 4)
    models.save(tmp_path / "copy", loaded, params)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "copy" / name).read_text())["eos_token_id"] == [3, 4]


def test_the_settings_of_generation_config_are_told_and_kept(tmp_path):
    lm, params = tiny_lm(0)
    models.save(tmp_path / "model", lm, params)
    path = tmp_path / "model" / "generation_config.json"
    ids = json.loads(path.read_text())
    settings = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "of_another_library": [[1], [2, 3]]}
    path.write_text(json.dumps(ids | settings | {"transformers_version": "4.0.0", "top_p": None}))
    with pytest.warns(UserWarning, match="do_sample=True, temperature=0.6, repetition_penalty=1.1, kept .* not used"):
        loaded, _ = models.load(tmp_path / "model")
    cut, fewer = models.cut_vocabulary(models.with_head(loaded, models.Head("value")), params, 7)
    for name, (saved, values) in {"copy": (loaded, params), "cut": (cut, fewer)}.items():
        saved = models.with_head(saved, None)
        values = {name: value for name, value in values.items() if name != "head"}
        models.save(tmp_path / name, saved, values)
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {name: written[name] for name in settings} == settings
        assert "transformers_version" not in written
        assert "top_p" not in written
    with pytest.warns(UserWarning, match="temperature=0.6"):
        again = models.read_config(tmp_path / "copy")
    assert again == loaded.config
    hash(again)


def test_cut_and_matched_vocabularies():
    wide, params = tiny_lm(0, "q", vocab_size=13)
    narrow, cut = models.cut_vocabulary(wide, params, 11)
    tokens = jnp.array([[1, 2, 3]])
    found, expected = forward(narrow, cut, tokens), forward(wide, params, tokens)
    np.testing.assert_allclose(found.logits, expected.logits[..., :11], rtol=1e-5)
    np.testing.assert_allclose(found.head, expected.head[..., :11], rtol=1e-5)
    with pytest.raises(ValueError, match="size"):
        models.cut_vocabulary(wide, params, 14)
    other = tiny_lm(1)
    with pytest.warns(UserWarning, match=r"critic: 13 rows cut .* 11"):
        matched = models.match_vocabulary(other, (wide, params), names=("base", "critic"))
    assert [lm.vocab_size for lm, _ in matched] == [11, 11]
    with pytest.raises(ValueError, match="models: expected at least one"):
        models.match_vocabulary()
    models.check_tokens({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2})
    with pytest.raises(ValueError, match=r"id 1 to be 'c' where the base has 'b'"):
        models.check_tokens({"a": 0, "b": 1}, {"a": 0, "c": 1})


@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_every_parameter_and_cache_array_names_its_axes(name):
    lm, params = models.load(make_golden.GOLDEN / name)
    _, cache = lm.prefill(params, jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool), 5)
    for path, leaf in jax.tree_util.tree_leaves_with_path((params, cache)):
        name = sharding.path_name(path[1:])
        assert len(sharding.logical_axes(name)) == leaf.ndim, name
    with pytest.raises(ValueError, match="nothing"):
        sharding.logical_axes("nothing")


def test_load_places_parameters_on_a_mesh(tmp_path):
    lm, params = tiny_lm(0, "value")
    models.save(tmp_path / "model", lm, params)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    _, placed = models.load(tmp_path / "model", mesh=mesh)
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding.mesh == mesh
    assert_trees_identical(placed, params)


def test_a_folder_that_is_not_there_is_no_riddle_of_the_hub(tmp_path, monkeypatch):
    """Two names with a slash may be a folder or a model of the hub: where neither is there, one line says so."""
    import huggingface_hub
    from huggingface_hub import errors

    def unreachable(*_, **__):
        raise errors.LocalEntryNotFoundError("no network\nand no snapshot")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = "^path: expected a folder or a model of the hub, found no folder runs/sft; LocalEntry.*: no network$"
    with pytest.raises(ValueError, match=message):
        models.load("runs/sft")

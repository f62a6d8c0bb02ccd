"""Every family: folders go out as they came in, a training step moves every parameter, adapters train."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.flax import load_file, save_file

from jaxalign import models, training
from jaxalign.models import lora
from jaxalign.models.hf.config import NEUTRAL
from jaxalign.training import objectives
from tests.models import families
from tests.models.make_golden import GOLDEN

FIRST = ["llama", "mistral", "qwen2", "qwen3"]
NAMES = [*FIRST, *(name for name in families.CHECKPOINTS if name.removesuffix("_reward") in families.FURTHER)]
LANGUAGE_MODELS = [*FIRST, *families.FURTHER]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_goes_out_as_it_came_in(name, tmp_path):
    """The same names, shapes and bits as in transformers' file, and a config.json that is read as the same Config."""
    lm, params = models.load(GOLDEN / name, dtype="bfloat16")
    models.save(tmp_path / "model", lm, params)
    assert models.read_config(tmp_path / "model") == lm.config
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", GOLDEN / name))
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_fields_that_a_saved_folder_has_are_those_that_transformers_knows(name):
    """What we write is read by transformers' config class: under the names of its own file, and with its values."""
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    ours = models.config_to_hf(models.config_from_hf(theirs))
    same = ours.keys() & theirs.keys() - {"rope_parameters", "dtype", "architectures", "layer_types"}
    same -= {"head_dim"} if theirs.get("head_dim") is None else set()  # None: what follows from the other sizes
    assert len(same) > 10
    assert {field: ours[field] for field in same} == {field: theirs[field] for field in same}
    assert ours["architectures"] == theirs["architectures"]


def rows(lm) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(3, lm.vocab_size, (1, 4, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([6, 4, 5, 3])[:, None]
    return {"tokens": tokens, "mask": mask[None], "loss_mask": mask[None] & (np.arange(6) >= 1)}


def moved(before, after) -> dict[str, bool]:
    """Path -> whether an array changed; all are finite."""
    changed = {}
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(np.asarray(new)).all(), path
        changed[jax.tree_util.keystr(path, simple=True, separator="/")] = bool((old != new).any())
    return changed


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_training_step_moves_every_parameter(name):
    lm, params = models.load(GOLDEN / name)
    optimizer = optax.sgd(0.1)
    step = training.train_step(objectives.language_model(lm), optimizer)
    state, metrics = step(training.create(params, optimizer), rows(lm), None)
    assert np.isfinite(metrics["loss"])
    assert float(metrics["grad_norm"]) > 1e-3
    changed = moved(params, state.params)
    assert all(changed.values()), [path for path, flag in changed.items() if not flag]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_an_adapter_has_gradients_and_merged_equals_beside(name):
    lm, params = models.load(GOLDEN / name)
    targets = ("qkv", "out") if lm.config.block.experts is not None else tuple(lora.TARGETS)
    spec = models.Lora(2, targets=targets)
    if len(targets) < 4:
        with pytest.raises(ValueError, match=r"targets: expected some of \('qkv', 'out'\)"):
            lora.init(jax.random.key(0), lm, models.Lora(2))
    adapter = jax.tree.map(lambda x: x + 0.05, lora.init(jax.random.key(0), lm, spec))
    tokens = jnp.asarray(rows(lm)["tokens"][0])

    @jax.jit
    def loss(adapter):
        logits = lm.apply(lora.attach(params, adapter, spec), tokens).logits
        return jax.nn.logsumexp(logits, axis=-1).mean(), logits

    (_, beside), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    merged = jax.jit(lm.apply)(lora.merge(params, adapter, spec), tokens).logits
    np.testing.assert_allclose(beside, merged, rtol=2e-4, atol=2e-4)


COMMON = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    *("rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "layer_types"),
    *("use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "original_max_position_embeddings"),
}
"""Fields that `config_from_hf` reads of every family that has them."""

NO_EFFECT = {
    *("initializer_range", "init_std", "use_cache", "pretraining_tp", "is_decoder", "reorder_and_upcast_attn"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "dropout", "layerdrop"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),  # of other heads
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),  # of training
}
"""Fields that change nothing in what a trained model computes."""


@pytest.mark.parametrize("name", models.hf.config.FAMILIES)
def test_every_field_of_a_familys_config_is_sorted(name):
    """A field that transformers adds to a family fails here until somebody has sorted it: read, of no effect, or
    refused where it is not neutral."""
    import transformers

    family = models.hf.config.FAMILIES[name]
    config_class = getattr(transformers, f"{family.architecture}Config")
    general = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(config_class)} - general
    own |= {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
    renamed = {theirs for theirs in family.names.values() if theirs is not None}
    sorted_out = COMMON | NO_EFFECT | renamed | set(family.reads) | set(NEUTRAL) | set(family.must_be_false)
    assert own <= sorted_out, sorted(own - sorted_out)


@pytest.mark.parametrize(
    ("name", "prefix", "buffers"),
    [
        ("gpt2", "transformer.", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("gpt_neox", "gpt_neox.", ["layers.0.attention.bias", "layers.1.attention.rotary_emb.inv_freq"]),
        ("opt", "model.", []),
        ("falcon", "transformer.", ["h.0.self_attention.rotary_emb.inv_freq"]),
    ],
)
def test_a_file_of_the_model_without_a_head_lacks_its_prefix_and_may_hold_buffers(name, prefix, buffers, tmp_path):
    """As GPT-2's and Pythia's files are; what is no buffer is still surplus."""
    shutil.copytree(GOLDEN / name, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = {key.removeprefix(prefix): x for key, x in load_file(file).items()}
    save_file(tensors | dict.fromkeys(buffers, jnp.ones(3)), file)
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "model")[1], models.load(GOLDEN / name)[1])
    save_file(tensors | {"h.0.attn.gain": jnp.ones(3)}, file)
    with pytest.raises(ValueError, match=r"surplus \['h\.0\.attn\.gain'\]"):
        models.load(tmp_path / "model")


def test_a_packed_tensor_of_another_shape_is_named(tmp_path):
    shutil.copytree(GOLDEN / "mixtral", tmp_path / "mixtral")
    shutil.copytree(GOLDEN / "phi3", tmp_path / "phi3")
    for name, key in (
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
    ):
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {key: tensors[key][:-1]}, file)
        with pytest.raises(ValueError, match=rf"{key}: expected shape .* found"):
            models.load(tmp_path / name)

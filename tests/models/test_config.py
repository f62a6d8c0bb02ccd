"""config.json in and out: what transformers takes a field to be, and what is refused by name."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxalign import models
from jaxalign.models.config import Config, Head
from jaxalign.models.families import FAMILIES, Family
from jaxalign.models.families.rules import LAYER, QK_NORM
from jaxalign.models.hf import rope
from tests.conftest import tiny_config, tiny_lm
from tests.models import families

SMALL = {
    "vocab_size": 61,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 64,
}


def from_hf(**fields) -> Config:
    return models.config_from_hf({"model_type": "llama"} | SMALL | fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_mean_what_transformers_takes_them_to_be(family):
    """transformers' own config classes say it: a window of 4096 for Mistral, 128 wide heads for Qwen3, EOS 2."""
    import transformers

    config = from_hf(model_type=family)
    config_class = getattr(transformers, FAMILIES[family].architecture + "Config")
    theirs = config_class(**families.known_fields(config_class, SMALL))

    def taken(field: str, otherwise=None):
        name = FAMILIES[family].names.get(field, field)
        return otherwise if name is None else getattr(theirs, name, otherwise)

    groups = {"falcon": 1}.get(family, theirs.num_attention_heads)  # Falcon's default is one group for all heads
    assert config.num_kv_heads == taken("num_key_value_heads", groups)
    assert config.head_dim == (taken("head_dim") or 8)
    assert config.norm_eps == taken("rms_norm_eps", 1e-5)
    if config.rope is None:
        assert not hasattr(theirs, "rope_parameters")
    else:
        settings = theirs.rope_parameters
        settings = settings.get("sliding_attention", settings) if family == "gemma3_text" else settings
        assert (config.rope.theta, config.rope.kind) == (settings["rope_theta"], settings["rope_type"])
        assert config.rope.share == settings.get("partial_rotary_factor", 1.0)
    assert config.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert (config.bos_id, config.pad_id) == (theirs.bos_token_id, theirs.pad_token_id)
    assert config.tie_embeddings == theirs.tie_word_embeddings
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 2
    windows = [getattr(theirs, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds]
    assert [config.window(i) for i in range(2)] == windows


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_windows_by_default(family):
    windows = {"use_sliding_window": True, "max_window_layers": 1}
    assert from_hf(model_type=family, **windows).window(1) == (None if family == "llama" else 4096)
    assert from_hf(model_type=family, **windows).window(0) == (4096 if family == "mistral" else None)


def test_a_null_is_not_an_absent_field():
    config = from_hf(model_type="mistral", sliding_window=None, eos_token_id=None, num_key_value_heads=None)
    assert (config.window(0), config.eos_ids, config.num_kv_heads) == (None, (), 32)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_rope_settings_of_both_layouts_may_stand_together_but_not_disagree():
    both = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    config = from_hf(**both, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=1.0)
    assert config.rope == models.Rope(5e5, "linear", 2.0)
    with pytest.raises(ValueError, match=r"factor: .*2\.0 and 4\.0 in rope_scaling"):
        from_hf(**both, rope_scaling={"rope_type": "linear", "factor": 4.0})
    for name in ("type", "rope_type"):
        with pytest.raises(ValueError, match=r"rope_type: .*'linear' and 'dynamic' in rope_scaling"):
            from_hf(**both, rope_scaling={name: "dynamic", "factor": 2.0})
        default = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        with pytest.raises(ValueError, match=r"rope_type: .*'default' and 'linear' in rope_scaling"):
            from_hf(**default, rope_scaling={name: "linear", "factor": 2.0})
        by_kind = {"rope_parameters": {kind: {"rope_type": "default"} for kind in rope.KINDS}}
        with pytest.raises(ValueError, match=r"rope_type: .*'default' and 'linear' in rope_scaling"):
            from_hf(model_type="gemma3_text", **by_kind, rope_scaling={name: "linear", "factor": 2.0})
        scaled = from_hf(model_type="gemma3_text", rope_scaling={name: "linear", "factor": 2.0}, num_hidden_layers=6)
        assert scaled.layer_rope(5) == models.Rope(1e6, "linear", 2.0)
    # llama3 without the length that it was trained for: the context, as transformers takes it.
    assert from_hf(rope_scaling=LLAMA3).rope.original_max_length == 64
    given = LLAMA3 | {"original_max_position_embeddings": 16}
    assert from_hf(rope_scaling=given).rope.original_max_length == 16


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("factor", {"rope_scaling": {"type": "linear"}}),
        ("low_freq_factor", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}),
        ("beta_fast", {"rope_parameters": LLAMA3 | {"beta_fast": 32}}),
        ("rope_type", {"rope_scaling": {"type": "proportional", "factor": 2.0}}),
        ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("partial_rotary_factor", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("auto_map", {"auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}}),
        ("jaxalign_head", {"jaxalign_head": {"kind": "value", "depth": 2}}),
        ("attention_bias", {"model_type": "mistral", "attention_bias": True}),
        ("layer_types", {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 2}),
        ("windows", {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["sliding_attention"]}),
        ("attention_chunk_size", {"attention_chunk_size": 8192}),
        ("num_key_value_heads|num_kv_heads", {"num_key_value_heads": 5}),
    ],
)
def test_what_changes_the_computation_and_is_not_supported_is_named(match, fields):
    with pytest.raises(ValueError, match=match):
        from_hf(**fields)


def test_fields_that_change_nothing_pass():
    harmless = {
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "use_cache": False,
        "auto_map": {"AutoTokenizer": "tokenization_own.Tokenizer"},
        "hidden_act": "swish",
        "quantization_config": None,
        "some_new_field": 3,
    }
    assert from_hf(**harmless) == from_hf()


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(family="mistral", windows=(5, 5)),
        tiny_config(family="qwen2", qkv_bias=True, windows=(None, 7), eos_ids=(1, 2), pad_id=3, bos_id=4),
        tiny_config(family="qwen3", qk_norm=True, qkv_bias=True, out_bias=True, tie_embeddings=True),
        tiny_config(rope=models.Rope(5e5, "llama3", 8.0, 1.0, 4.0, 16), qkv_bias=True, out_bias=True, mlp_bias=True),
        tiny_config(Head("reward", num_labels=3)),
        tiny_config(Head("value", hidden_size=8, num_hidden=2, activation="relu")),
    ],
)
def test_to_hf_and_back(config):
    assert models.config_from_hf(models.config_to_hf(config)) == config


def test_a_new_family_is_one_entry(monkeypatch, tmp_path):
    """Llama with norms on queries and keys, as CONTRIBUTING.md adds it: config and tensors go out and come back."""
    mine = Family("Mine", LAYER, optional=(("qk_norm", QK_NORM),), options={"qk_norm": True})
    monkeypatch.setitem(FAMILIES, "mine", mine)
    lm, params = tiny_lm(0, family="mine", qk_norm=True)
    models.save(tmp_path / "model", lm, params)
    again, copied = models.load(tmp_path / "model")
    assert again == lm
    jax.tree.map(np.testing.assert_array_equal, copied, params)
    with pytest.raises(ValueError, match="family 'mine' cannot express"):
        models.config_to_hf(tiny_config(family="mine"))


def test_a_config_that_its_family_cannot_express_is_refused():
    with pytest.raises(ValueError, match="family 'mistral' cannot express"):
        models.config_to_hf(tiny_config(family="mistral", windows=(5, None)))


def test_values_are_checked():
    for match, changes in {
        "head_dim": {"head_dim": 5},
        "windows": {"windows": (0, None)},
        "intermediate_size": {"intermediate_size": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            tiny_config(**changes)
    for match, fields in {
        "kind": {"kind": "advantage"},
        "activation": {"kind": "value", "activation": "swish"},
        "hidden_size": {"kind": "reward", "hidden_size": 3},
        "num_hidden": {"kind": "value", "hidden_size": 3, "num_hidden": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            Head(**fields)
    with pytest.raises(ValueError, match="dtype"):
        models.LanguageModel(tiny_config(), "int8")
    # One spelling of "all layers are full", or equal models would not share their traces.
    assert tiny_config(windows=(None, None)) == tiny_config()
    assert hash(dataclasses.replace(tiny_config(), windows=(None, None))) == hash(tiny_config())

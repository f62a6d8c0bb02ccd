"""Gemma 3, text: Gemma 2 with norms on queries and keys in place of caps, and rotary positions of their own in the
layers with a window, which are five of six."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.block import Block
from jaxalign.models.config import Config
from jaxalign.models.families import gemma2
from jaxalign.models.families.rules import OUT_BIAS, QK_NORM, QKV_BIAS, Family


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """No window in every sixth layer, where the file does not say which layers have them."""
    every = values.get("sliding_window_pattern") or 6
    layers = range(values["num_hidden_layers"])
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
    return values | {"layer_types": values.get("layer_types") or kinds}


def block(values: Mapping[str, Any]) -> Block:
    return gemma2.block(values)


def describe(config: Config) -> dict[str, Any]:
    fields = gemma2.describe(config)
    del fields["attn_logit_softcapping"]  # transformers has the field and does not apply it
    return fields


GEMMA3 = Family(
    "Gemma3Text",
    gemma2.LAYER,
    optional=(("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("qk_norm", QK_NORM)),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "qk_norm": True},
    windows="by_layer",
    window_switch=False,
    defaults=gemma2.DEFAULTS | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    names={"hidden_act": "hidden_activation"},
    complete=complete,
    block=block,
    describe=describe,
    reads=("query_pre_attn_scalar", "final_logit_softcapping", "sliding_window_pattern", "rope_local_base_freq"),
    ropes="local",
    causal="Gemma3ForCausalLM",
)

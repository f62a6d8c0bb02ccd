"""Gemma 2: norms before and after attention and MLP, with scales around 1; caps on scores and logits; scaled
embeddings; a window in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.block import Block
from jaxalign.models.config import Config
from jaxalign.models.families.rules import OUT_BIAS, PREFIX_LAYER, QKV_BIAS, Family, linear, scale

LAYER = (
    scale("attention_norm", PREFIX_LAYER + "input_layernorm"),
    linear("attention/qkv", *(f"{PREFIX_LAYER}self_attn.{name}_proj" for name in "qkv"), sizes="qkv"),
    linear("attention/out", PREFIX_LAYER + "self_attn.o_proj"),
    scale("attention_post_norm", PREFIX_LAYER + "post_attention_layernorm"),
    scale("mlp_norm", PREFIX_LAYER + "pre_feedforward_layernorm"),
    linear("gate_up", *(f"{PREFIX_LAYER}mlp.{name}_proj" for name in ("gate", "up")), sizes="gate_up"),
    linear("down", PREFIX_LAYER + "mlp.down_proj"),
    scale("mlp_post_norm", PREFIX_LAYER + "post_feedforward_layernorm"),
)
DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "sliding_window": 4096,
}


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """Windows in the first of every two layers, where the file does not say which layers have them."""
    layers = range(values["num_hidden_layers"])
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in layers]
    return values | {"layer_types": values.get("layer_types") or kinds}


def block(values: Mapping[str, Any]) -> Block:
    return Block(
        norm_offset=1.0,
        norm_place="both",
        query_scale=values["query_pre_attn_scalar"] ** -0.5,
        attention_cap=values.get("attn_logit_softcapping"),
        logits_cap=values.get("final_logit_softcapping"),
        embedding_scale=values["hidden_size"] ** 0.5,
    )


def describe(config: Config) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "attn_logit_softcapping": config.block.attention_cap,
        "final_logit_softcapping": config.block.logits_cap,
    }


GEMMA2 = Family(
    "Gemma2",
    LAYER,
    optional=(("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS)),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
    windows="by_layer",
    window_switch=False,
    defaults=DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    names={"hidden_act": "hidden_activation"},
    complete=complete,
    block=block,
    describe=describe,
    reads=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)

"""GPT-NeoX (Pythia): attention and MLP side by side, each with a layer norm; a part of each head rotated; queries, keys
and values of each head next to each other in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.block import Block
from jaxalign.models.config import Config
from jaxalign.models.families.rules import Family, Rule, bias, layer_norm, linear

_LAYER = "gpt_neox.layers.{i}."


def block(values: Mapping[str, Any]) -> Block:
    parallel = values["use_parallel_residual"]
    return Block(norm="layer", gated=False, residual="parallel" if parallel else "sequential")


def describe(config: Config) -> dict[str, Any]:
    return {"use_parallel_residual": config.block.residual == "parallel"}


GPT_NEOX = Family(
    "GPTNeoX",
    (
        *layer_norm("attention_norm", _LAYER + "input_layernorm"),
        linear("attention/qkv", _LAYER + "attention.query_key_value", sizes="qkv", packed="by_group"),
        linear("attention/out", _LAYER + "attention.dense"),
        *layer_norm("mlp_norm", _LAYER + "post_attention_layernorm"),
        linear("gate_up", _LAYER + "mlp.dense_h_to_4h", sizes="gate_up"),
        bias("gate_up", _LAYER + "mlp.dense_h_to_4h", sizes="gate_up"),
        linear("down", _LAYER + "mlp.dense_4h_to_h"),
        bias("down", _LAYER + "mlp.dense_4h_to_h"),
    ),
    optional=(
        ("qkv_bias", (bias("attention/qkv", _LAYER + "attention.query_key_value", sizes="qkv", packed="by_group"),)),
        ("out_bias", (bias("attention/out", _LAYER + "attention.dense"),)),
    ),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": True},
    defaults={
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "use_parallel_residual": True,
        "partial_rotary_factor": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    names={
        "rms_norm_eps": "layer_norm_eps",
        "partial_rotary_factor": "rotary_pct",
        "rope_theta": "rotary_emb_base",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    block=block,
    describe=describe,
    reads=("use_parallel_residual", "partial_rotary_factor"),
    ropes="partial",
    surround=(
        Rule("transformer/embedding", ("gpt_neox.embed_in.weight",)),
        Rule("transformer/norm/scale", ("gpt_neox.final_layer_norm.weight",)),
        Rule("transformer/norm/bias", ("gpt_neox.final_layer_norm.bias",)),
    ),
    lm_head="embed_out.weight",
    prefix="gpt_neox.",
    harmless=r"\.attention\.(bias|masked_bias)$",
)

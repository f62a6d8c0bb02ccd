"""OPT: layer norms, learned positions from row 2 on, an MLP with ReLU and without a gate, biases."""

from __future__ import annotations

from typing import Any

from jaxalign.models.block import Block
from jaxalign.models.config import Config
from jaxalign.models.families.rules import Family, Rule, bias, layer_norm, linear

_LAYER = "model.decoder.layers.{i}."
_QKV = tuple(f"{_LAYER}self_attn.{name}_proj" for name in "qkv")


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """Embeddings are as wide as the residual stream; those of OPT-350m, which a matrix widens, are refused."""
    width = values.get("word_embed_proj_dim")
    if width is not None and width != values["hidden_size"]:
        raise ValueError(f"word_embed_proj_dim: expected hidden_size, {values['hidden_size']}, found {width!r}")
    return values


def describe(config: Config) -> dict[str, Any]:
    return {"word_embed_proj_dim": config.hidden_size}


OPT = Family(
    "OPT",
    (
        *layer_norm("attention_norm", _LAYER + "self_attn_layer_norm"),
        linear("attention/qkv", *_QKV, sizes="qkv"),
        linear("attention/out", _LAYER + "self_attn.out_proj"),
        *layer_norm("mlp_norm", _LAYER + "final_layer_norm"),
        linear("gate_up", _LAYER + "fc1", sizes="gate_up"),
        linear("down", _LAYER + "fc2"),
    ),
    optional=(
        ("qkv_bias", (bias("attention/qkv", *_QKV, sizes="qkv"),)),
        ("out_bias", (bias("attention/out", _LAYER + "self_attn.out_proj"),)),
        ("mlp_bias", (bias("gate_up", _LAYER + "fc1", sizes="gate_up"), bias("down", _LAYER + "fc2"))),
    ),
    options={"qkv_bias": "enable_bias", "out_bias": "enable_bias", "mlp_bias": "enable_bias"},
    defaults={
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,  # of torch's LayerNorm: the file has no field for it
        "enable_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    names={
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
        "rms_norm_eps": None,
        "num_key_value_heads": None,
        "head_dim": None,
    },
    complete=complete,
    block=lambda values: Block(norm="layer", gated=False, learned_positions=True, position_offset=2),
    describe=describe,
    reads=("enable_bias", "word_embed_proj_dim"),
    ropes="none",
    surround=(
        Rule("transformer/embedding", ("model.decoder.embed_tokens.weight",)),
        Rule("transformer/positions", ("model.decoder.embed_positions.weight",)),
        Rule("transformer/norm/scale", ("model.decoder.final_layer_norm.weight",)),
        Rule("transformer/norm/bias", ("model.decoder.final_layer_norm.bias",)),
    ),
)

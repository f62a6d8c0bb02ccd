"""Falcon: layer norms, attention and MLP side by side (7B: by one norm, 40B: by two) or after each other (RW), queries,
keys and values of each group of heads next to each other in one tensor. Positions by ALiBi are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jaxalign.models.block import Block
from jaxalign.models.config import Config
from jaxalign.models.families.rules import Family, Rule, bias, layer_norm, linear

_LAYER = "transformer.h.{i}."


def complete(values: dict[str, Any]) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    if values["new_decoder_architecture"] and not values["parallel_attn"]:
        raise ValueError("parallel_attn: expected True with new_decoder_architecture, found False")
    if values["new_decoder_architecture"]:
        groups = values.get("num_kv_heads") or heads
    else:
        groups = 1 if values["multi_query"] else heads
    return values | {
        "num_key_value_heads": groups,
        "intermediate_size": values.get("intermediate_size") or 4 * values["hidden_size"],
    }


def block(values: Mapping[str, Any]) -> Block:
    new, norms = values["new_decoder_architecture"], values.get("num_ln_in_parallel_attn")
    residual: Literal["sequential", "parallel", "parallel_shared"]
    if not new and not values["parallel_attn"]:
        residual = "sequential"
    else:
        residual = "parallel" if new and norms in (None, 2) else "parallel_shared"
    return Block(norm="layer", gated=False, residual=residual)


def describe(config: Config) -> dict[str, Any]:
    residual, groups, heads = config.block.residual, config.num_kv_heads, config.num_heads
    new = residual == "parallel" or groups not in (1, heads)
    found: dict[str, Any] = {
        "new_decoder_architecture": new,
        "multi_query": new or groups == 1,
        "parallel_attn": residual != "sequential",
        "num_kv_heads": groups if new else heads,
    }
    return found | ({"num_ln_in_parallel_attn": 2 if residual == "parallel" else 1} if new else {})


_QKV = _LAYER + "self_attention.query_key_value"
_UP, _DOWN = _LAYER + "mlp.dense_h_to_4h", _LAYER + "mlp.dense_4h_to_h"

FALCON = Family(
    "Falcon",
    (
        linear("attention/qkv", _QKV, sizes="qkv", packed="by_group"),
        linear("attention/out", _LAYER + "self_attention.dense"),
        linear("gate_up", _UP, sizes="gate_up"),
        linear("down", _DOWN),
    ),
    optional=(
        (lambda c: c.block.residual == "parallel", layer_norm("attention_norm", _LAYER + "ln_attn")),
        (lambda c: c.block.residual == "parallel", layer_norm("mlp_norm", _LAYER + "ln_mlp")),
        (lambda c: c.block.residual != "parallel", layer_norm("attention_norm", _LAYER + "input_layernorm")),
        (lambda c: c.block.residual == "sequential", layer_norm("mlp_norm", _LAYER + "post_attention_layernorm")),
        ("qkv_bias", (bias("attention/qkv", _QKV, sizes="qkv", packed="by_group"),)),
        ("out_bias", (bias("attention/out", _LAYER + "self_attention.dense"),)),
        ("mlp_bias", (bias("gate_up", _UP, sizes="gate_up"), bias("down", _DOWN))),
    ),
    options={"qkv_bias": "bias", "out_bias": "bias", "mlp_bias": "bias"},
    defaults={
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bos_token_id": 11,
        "eos_token_id": 11,
    },
    names={
        "intermediate_size": "ffn_hidden_size",
        "hidden_act": "activation",
        "rms_norm_eps": "layer_norm_epsilon",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    complete=complete,
    block=block,
    describe=describe,
    reads=(
        "new_decoder_architecture",
        "multi_query",
        "parallel_attn",
        "num_ln_in_parallel_attn",
        "num_kv_heads",
        "bias",
    ),
    surround=(
        Rule("transformer/embedding", ("transformer.word_embeddings.weight",)),
        Rule("transformer/norm/scale", ("transformer.ln_f.weight",)),
        Rule("transformer/norm/bias", ("transformer.ln_f.bias",)),
    ),
    prefix="transformer.",
    code="modeling_falcon.",
)

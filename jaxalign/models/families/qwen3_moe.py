"""Qwen3-MoE: Qwen3 with experts in place of each MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.block import Block, Experts
from jaxalign.models.config import Config
from jaxalign.models.families.rules import ATTENTION, OUT_BIAS, PREFIX_LAYER, QK_NORM, QKV_BIAS, Family, Rule

_EXPERT = PREFIX_LAYER + "mlp.experts.{e}."


def complete(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"sliding_window": values.get("sliding_window") if values.get("use_sliding_window") else None}


def block(values: Mapping[str, Any]) -> Block:
    normalized = bool(values["norm_topk_prob"])
    return Block(experts=Experts(values["num_experts"], values["num_experts_per_tok"], normalized))


def describe(config: Config) -> dict[str, Any]:
    experts = config.block.experts
    if experts is None:
        return {}
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "norm_topk_prob": experts.normalized,
        "use_sliding_window": config.window(0) is not None,
    }


QWEN3_MOE = Family(
    "Qwen3Moe",
    (
        *ATTENTION,
        Rule("transformer/layer_{i}/experts/router", (PREFIX_LAYER + "mlp.gate.weight",), True),
        Rule(
            "transformer/layer_{i}/experts/gate_up",
            (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
            True,
            packed="experts",
        ),
        Rule("transformer/layer_{i}/experts/down", (_EXPERT + "down_proj.weight",), True, packed="experts"),
    ),
    optional=(("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("qk_norm", QK_NORM)),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "qk_norm": True},
    windows="every_layer",
    defaults={
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    names={"intermediate_size": "moe_intermediate_size", "num_experts": "num_local_experts"},
    complete=complete,
    block=block,
    describe=describe,
    reads=("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"),
)

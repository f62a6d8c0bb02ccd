"""Granite: Llama with embeddings, scores, what is added to the residual stream, and logits multiplied by numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.block import Block
from jaxalign.models.config import Config
from jaxalign.models.families.rules import LAYER, MLP_BIAS, OUT_BIAS, QKV_BIAS, Family


def block(values: Mapping[str, Any]) -> Block:
    return Block(
        embedding_scale=values["embedding_multiplier"],
        query_scale=values["attention_multiplier"],
        residual_scale=values["residual_multiplier"],
        logits_scale=1 / values["logits_scaling"],
    )


def describe(config: Config) -> dict[str, Any]:
    return {
        "embedding_multiplier": config.block.embedding_scale,
        "attention_multiplier": config.query_scale,
        "residual_multiplier": config.block.residual_scale,
        "logits_scaling": round(1 / config.block.logits_scale, 9),
    }


GRANITE = Family(
    "Granite",
    LAYER,
    optional=(("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("mlp_bias", MLP_BIAS)),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={
        "bos_token_id": 1,
        "eos_token_id": 2,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    block=block,
    describe=describe,
    reads=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
)

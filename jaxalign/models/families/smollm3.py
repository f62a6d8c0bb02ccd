"""SmolLM3: Llama with every fourth layer without positions."""

from __future__ import annotations

from typing import Any

from jaxalign.models.families.rules import LAYER, MLP_BIAS, OUT_BIAS, QKV_BIAS, Family


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """The layers without positions, and those with a window where there is one, as transformers places them."""
    every = values.get("no_rope_layer_interval") or 4
    layers = range(values["num_hidden_layers"])
    rotated = values.get("no_rope_layers") or [int((i + 1) % every != 0) for i in layers]
    kinds = ["full_attention" if flag else "sliding_attention" for flag in rotated]
    return values | {"no_rope_layers": rotated, "layer_types": values.get("layer_types") or kinds}


SMOLLM3 = Family(
    "SmolLM3",
    LAYER,
    optional=(("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("mlp_bias", MLP_BIAS)),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    windows="by_layer",
    defaults={
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    complete=complete,
    reads=("no_rope_layers", "no_rope_layer_interval"),
)

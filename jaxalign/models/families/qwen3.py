"""Qwen3: Llama with norms on queries and keys, and a sliding window in some layers."""

from jaxalign.models.families.rules import LAYER, OUT_BIAS, QK_NORM, QKV_BIAS, Family

QWEN3 = Family(
    "Qwen3",
    LAYER,
    optional=(("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("qk_norm", QK_NORM)),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "qk_norm": True},
    windows="by_layer",
    defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
)

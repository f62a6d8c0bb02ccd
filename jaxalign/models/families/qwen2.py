"""Qwen2: Llama with biases on queries, keys and values, and a sliding window in some layers."""

from jaxalign.models.families.rules import LAYER, QKV_BIAS, Family

QWEN2 = Family(
    "Qwen2",
    LAYER,
    optional=(("qkv_bias", QKV_BIAS),),
    options={"qkv_bias": True},
    windows="by_layer",
    defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
)

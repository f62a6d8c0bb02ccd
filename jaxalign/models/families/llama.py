"""Llama: optional biases on the projections of attention and of the MLP."""

from jaxalign.models.families.rules import LAYER, MLP_BIAS, OUT_BIAS, QKV_BIAS, Family

LLAMA = Family(
    "Llama",
    LAYER,
    optional=(("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("mlp_bias", MLP_BIAS)),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={"bos_token_id": 1, "eos_token_id": 2},
)

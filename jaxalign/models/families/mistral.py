"""Mistral: Llama without biases, with one sliding window for all layers."""

from jaxalign.models.families.rules import LAYER, Family

MISTRAL = Family(
    "Mistral",
    LAYER,
    windows="every_layer",
    defaults={"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
    must_be_false=("attention_bias",),
)

"""GPT-2: layer norms, learned positions, an MLP without a gate, biases everywhere, matrices stored [in, out]."""

from __future__ import annotations

from typing import Any

from jaxalign.models.block import Block
from jaxalign.models.families.rules import Family, Rule, bias, layer_norm, linear

_LAYER = "transformer.h.{i}."


def complete(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"intermediate_size": values.get("intermediate_size") or 4 * values["hidden_size"]}


GPT2 = Family(
    "GPT2",
    (
        *layer_norm("attention_norm", _LAYER + "ln_1"),
        linear("attention/qkv", _LAYER + "attn.c_attn", sizes="qkv", packed="concatenated")._replace(transpose=False),
        bias("attention/qkv", _LAYER + "attn.c_attn", sizes="qkv", packed="concatenated"),
        linear("attention/out", _LAYER + "attn.c_proj")._replace(transpose=False),
        bias("attention/out", _LAYER + "attn.c_proj"),
        *layer_norm("mlp_norm", _LAYER + "ln_2"),
        linear("gate_up", _LAYER + "mlp.c_fc", sizes="gate_up")._replace(transpose=False),
        bias("gate_up", _LAYER + "mlp.c_fc", sizes="gate_up"),
        linear("down", _LAYER + "mlp.c_proj")._replace(transpose=False),
        bias("down", _LAYER + "mlp.c_proj"),
    ),
    options={"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    defaults={
        "hidden_act": "gelu_new",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    complete=complete,
    block=lambda values: Block(norm="layer", gated=False, learned_positions=True),
    ropes="none",
    surround=(
        Rule("transformer/embedding", ("transformer.wte.weight",)),
        Rule("transformer/positions", ("transformer.wpe.weight",)),
        Rule("transformer/norm/scale", ("transformer.ln_f.weight",)),
        Rule("transformer/norm/bias", ("transformer.ln_f.bias",)),
    ),
    prefix="transformer.",
    causal="GPT2LMHeadModel",
    harmless=r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$",
)

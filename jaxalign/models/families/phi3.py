"""Phi-3: Llama with one tensor for queries, keys and values and one for gate and up, a part of each head rotated, and
longrope."""

from __future__ import annotations

from typing import Any

from jaxalign.models.config import Config
from jaxalign.models.families.rules import PREFIX_LAYER, Family, linear, scale


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """Earlier names of longrope, "su" and "yarn", as transformers takes them."""
    renamed = dict(values)
    for layout in ("rope_parameters", "rope_scaling"):
        settings = values.get(layout)
        if isinstance(settings, dict):
            key = "rope_type" if "rope_type" in settings else "type"
            if settings.get(key) in ("su", "yarn"):
                renamed[layout] = settings | {key: "longrope"}
    return renamed


def describe(config: Config) -> dict[str, Any]:
    longrope = config.rope is not None and config.rope.kind == "longrope"
    original = config.rope.original_max_length if config.rope is not None and longrope else config.max_length
    return {"original_max_position_embeddings": original}


PHI3 = Family(
    "Phi3",
    (
        scale("attention_norm", PREFIX_LAYER + "input_layernorm"),
        linear("attention/qkv", PREFIX_LAYER + "self_attn.qkv_proj", sizes="qkv", packed="concatenated"),
        linear("attention/out", PREFIX_LAYER + "self_attn.o_proj"),
        scale("mlp_norm", PREFIX_LAYER + "post_attention_layernorm"),
        linear("gate_up", PREFIX_LAYER + "mlp.gate_up_proj", sizes="gate_up", packed="concatenated"),
        linear("down", PREFIX_LAYER + "mlp.down_proj"),
    ),
    windows="every_layer",
    defaults={
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
    },
    must_be_false=("attention_bias",),
    complete=complete,
    describe=describe,
    reads=("partial_rotary_factor",),
    ropes="partial",
    code="modeling_phi3.",
)

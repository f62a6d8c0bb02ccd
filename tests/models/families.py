"""The tiny checkpoints of the parity tests, as transformers' own config classes name them."""

from __future__ import annotations

import dataclasses
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}

ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# name -> (family, kind of checkpoint, fields beyond COMMON)
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", {}),
    "llama3": ("Llama", "ForCausalLM", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": (
        "Llama",
        "ForCausalLM",
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_reward": ("Llama", "ForSequenceClassification", {"num_labels": 1}),
    "mistral_reward": (
        "Mistral",
        "ForSequenceClassification",
        {"sliding_window": 4, "head_dim": 16, "num_hidden_layers": 1, "id2label": dict(enumerate(ASPECTS))},
    ),
    "mistral": ("Mistral", "ForCausalLM", {"sliding_window": 4, "head_dim": 16}),
    "qwen2": ("Qwen2", "ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2",
        "ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen2_reward": (
        "Qwen2",
        "ForSequenceClassification",
        {"num_hidden_layers": 1, "id2label": {0: "rejected", 1: "accepted"}},
    ),
    "qwen3": ("Qwen3", "ForCausalLM", {"head_dim": 12}),
    "qwen3_reward": ("Qwen3", "ForSequenceClassification", {"num_labels": 1, "head_dim": 12}),
}

# Of the further families: smaller, and of the logits the first columns alone are kept.
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
COLUMNS = 8
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 6, "sliding_window": 4, "final_logit_softcapping": 3.0}
LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 6,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.1, 1.5],
    "long_factor": [1.7, 3.0],
    "partial_rotary_factor": 0.5,
}
PHI3 = {"num_attention_heads": 2, "rope_parameters": LONGROPE, "original_max_position_embeddings": 6}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 4.0,
}
FALCON40 = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 24}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
            "max_position_embeddings": 6,
        },
    ),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", GEMMA | {"rope_parameters": LOCAL, "num_hidden_layers": 3, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", PHI3),
    "gpt2": ("GPT2", {"n_inner": 24}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5, "rotary_emb_base": 100}),
    "olmo2": ("Olmo2", {}),
    "opt": ("OPT", {"ffn_dim": 24}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "granite": ("Granite", MULTIPLIERS),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}),
    "falcon": ("Falcon", {"ffn_hidden_size": 24}),
    "falcon40": ("Falcon", FALCON40),
}
"""name -> (family, fields beyond COMMON and SMALL): a language model and, where the family is new, a reward model."""

CHECKPOINTS |= {name: (family, "ForCausalLM", SMALL | fields) for name, (family, fields) in FURTHER.items()}
CHECKPOINTS |= {
    f"{name}_reward": (
        family,
        "ForSequenceClassification",
        SMALL | {"num_hidden_layers": 1, "num_labels": 1} | fields,
    )
    for name, (family, fields) in FURTHER.items()
    if family not in ("Llama", "Granite")  # transformers has no classifier of Granite
}

STRETCHED = ("llama_dynamic", "phi3", "phi3_reward")
"""Those whose rotary frequencies change beyond an original context of 6 tokens."""

# Compared live, where torch is installed: deeper and wider, longer rows, and what the tiny ones leave out.
LARGER: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
LIVE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3_wide_heads": (
        "Llama",
        "ForCausalLM",
        LARGER | {"head_dim": 20, "num_key_value_heads": 1, "rope_parameters": LLAMA3 | {"factor": 8.0}},
    ),
    "mistral_wide_reward": ("Mistral", "ForSequenceClassification", LARGER | {"sliding_window": 7, "num_labels": 1}),
    "qwen2_deep_windows": (
        "Qwen2",
        "ForCausalLM",
        LARGER | {"num_key_value_heads": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3_layer_types": (
        "Qwen3",
        "ForCausalLM",
        LARGER
        | {
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": LINEAR,
        },
    ),
    "gemma2_with_biases": ("Gemma2", "ForCausalLM", LARGER | GEMMA | {"attention_bias": True}),
    "gemma3_of_old": (
        "Gemma3Text",
        "ForCausalLM",
        LARGER | GEMMA | {"num_hidden_layers": 7, "rope_parameters": None},
    ),
    "phi3_with_a_window": ("Phi3", "ForCausalLM", LARGER | {"sliding_window": 5, "num_key_value_heads": 3}),
    "gpt_neox_sequential": (
        "GPTNeoX",
        "ForCausalLM",
        LARGER | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "opt_without_biases": ("OPT", "ForCausalLM", LARGER | {"enable_bias": False}),
    "olmo2_with_biases": ("Olmo2", "ForCausalLM", LARGER | {"attention_bias": True, "num_key_value_heads": 3}),
    "smollm3_with_windows": (
        "SmolLM3",
        "ForCausalLM",
        LARGER | {"use_sliding_window": True, "sliding_window": 5, "mlp_bias": True},
    ),
    "granite_with_biases": ("Granite", "ForCausalLM", LARGER | MULTIPLIERS | {"attention_bias": True}),
    "mixtral_with_a_window": (
        "Mixtral",
        "ForCausalLM",
        LARGER | {"sliding_window": 6, "num_local_experts": 5, "num_experts_per_tok": 3},
    ),
    "qwen3_moe_normalized": (
        "Qwen3Moe",
        "ForCausalLM",
        LARGER
        | {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 40,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "falcon_rw": ("Falcon", "ForCausalLM", LARGER | {"parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon_11b": ("Falcon", "ForCausalLM", LARGER | FALCON40 | {"num_ln_in_parallel_attn": 1}),
    "falcon_all_heads": ("Falcon", "ForCausalLM", LARGER | {"multi_query": False}),
    "qwen2_yarn": ("Qwen2", "ForCausalLM", LARGER | {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}),
    "llama_longrope": (
        "Llama",
        "ForCausalLM",
        LARGER
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [1.5 + 0.5 * i for i in range(8)],
                "original_max_position_embeddings": 12,
                "factor": 4.0,
            }
        },
    ),
}

PADDINGS = ("none", "left", "right")

# What a classifier's pad id may be: none, an EOS (as TRL's trainer leaves it), or an id of its own.
PADS: dict[str, int | None] = {"no pad": None, "pad is EOS": 2, "own pad": 3}
REWARD_ROWS = [
    [7, 8, 9, 10, 11, 12, 13, 14, 2],  # ends in an EOS
    [20, 21, 22, 60, 5],  # in another EOS
    [30, 2, 31, 32, 33, 34, 35],  # an EOS inside, no end
    [40, 41, 2, 2],  # two at the end
    [42, 43, 3, 44, 3],  # the other pad id inside and at the end
    [50],
    [2] * 9,  # pads alone where the pad is the EOS
    [3] * 9,  # where it is the other
]


def class_names(family: str, kind: str) -> tuple[str, str]:
    """The names of transformers' classes: of the config, and of the model."""
    causal = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    whole = causal.get(family, f"{family}{kind}") if kind == "ForCausalLM" else f"{family}{kind}"
    return f"{family}Config", whole


def known_fields(config_class: type, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a config class of transformers has, by whatever name, and those that it takes besides."""
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    given = {"num_labels", "id2label", "rotary_pct", "rotary_emb_base", "sliding_window_pattern", "head_dim"}
    given -= {"head_dim"} if config_class.model_type == "falcon" else set()
    return {name: value for name, value in fields.items() if name in known | given}


def classifiers() -> list[str]:
    """The names of the checkpoints with a reward head."""
    return [name for name, (_, kind, _) in CHECKPOINTS.items() if kind == "ForSequenceClassification"]


def reward_batches(pad: str) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    """Padding -> (tokens, attention mask) of REWARD_ROWS padded with that id: for "none" each text is a batch of its
    own. Without a pad id there is no other way, since transformers refuses a batch."""
    rows = {f"none {b}": ([row], [[1] * len(row)]) for b, row in enumerate(REWARD_ROWS)}
    pad_id = PADS[pad]
    if pad_id is None:
        return rows
    width = max(map(len, REWARD_ROWS))
    for padding in ("left", "right"):
        tokens, mask = [], []
        for row in REWARD_ROWS:
            pads = width - len(row)
            left = pads if padding == "left" else 0
            tokens.append([pad_id] * left + row + [pad_id] * (pads - left))
            mask.append([0] * left + [1] * len(row) + [0] * (pads - left))
        rows[padding] = (tokens, mask)
    return rows


ROWS = [[7, 8, 9, 10, 11, 12, 13, 14, 2], [20, 21, 22, 60, 5], [30, 2, 31, 32, 33, 34, 35]]
LONG_ROWS = [[(37 * i + 11 * b) % 300 for i in range(length)] for b, length in enumerate((24, 9, 17))]


def inputs(padding: str, rows: list[list[int]] = ROWS) -> tuple[list[list[int]], list[list[int]]]:
    """(tokens, attention mask): three rows; pads are the EOS id on purpose, since masks come from lengths."""
    width = max(map(len, rows))
    if padding == "none":
        rows = [(row * 3)[:width] for row in rows]
    tokens, mask = [], []
    for row in rows:
        pads = width - len(row)
        left = pads if padding == "left" else 0
        tokens.append([2] * left + row + [2] * (pads - left))
        mask.append([0] * left + [1] * len(row) + [0] * (pads - left))
    return tokens, mask

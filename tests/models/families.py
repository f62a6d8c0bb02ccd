"""The tiny checkpoints of the parity tests, as transformers' own config classes name them."""

from __future__ import annotations

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
    "mistral": ("Mistral", "ForCausalLM", {"sliding_window": 4, "head_dim": 16}),
    "qwen2": ("Qwen2", "ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2",
        "ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", "ForCausalLM", {"head_dim": 12}),
    "qwen3_reward": ("Qwen3", "ForSequenceClassification", {"num_labels": 1, "head_dim": 12}),
}

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
    "mistral_reward": ("Mistral", "ForSequenceClassification", LARGER | {"sliding_window": 7, "num_labels": 1}),
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
}

PADDINGS = ("none", "left", "right")


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

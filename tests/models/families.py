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

PADDINGS = ("none", "left", "right")


def inputs(padding: str) -> tuple[list[list[int]], list[list[int]]]:
    """(tokens, attention mask): three rows; pads are the EOS id on purpose, since masks come from lengths."""
    rows = [[7, 8, 9, 10, 11, 12, 13, 14, 2], [20, 21, 22, 60, 5], [30, 2, 31, 32, 33, 34, 35]]
    if padding == "none":
        rows = [(row * 3)[:9] for row in rows]
    width = max(map(len, rows))
    tokens, mask = [], []
    for row in rows:
        pads = width - len(row)
        left = pads if padding == "left" else 0
        tokens.append([2] * left + row + [2] * (pads - left))
        mask.append([0] * left + [1] * len(row) + [0] * (pads - left))
    return tokens, mask

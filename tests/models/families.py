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

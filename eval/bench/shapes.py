"""config.json of published models, for what is asked of their shapes alone: no weights, tokenizers or ids of theirs."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxalign import _io

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
SMALL_LLAMA = LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": SMALL_LLAMA,
    "Llama-3.1-8B": LLAMA,
    "Qwen3-8B": QWEN,
    "Skywork-Reward-V2-Llama-3.1-8B": LLAMA | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
    "Skywork-Reward-V2-Qwen3-8B": QWEN | {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1},
}
"""Name -> config.json, its special tokens aside."""


def write(name: str, folder: pathlib.Path, tokenizer: pathlib.Path, *, layers: int = 0) -> None:
    """Writes a model's folder without weights.

    Args:
      name: a key of SHAPES.
      folder: is made.
      tokenizer: folder of the tokenizer that it gets, with fewer tokens than the model has rows.
      layers: in place of the model's own number; 0 for that.
    """
    from jaxalign import models

    folder.mkdir(parents=True)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    eos = models.tokenizer(str(tokenizer)).eos_token_id
    values = SHAPES[name] | {"eos_token_id": eos, "pad_token_id": None}
    values |= {"num_hidden_layers": layers} if layers else {}
    _io.write_own_json(folder / "config.json", values)

"""Folders of small models, adapters and tokenizers as they should be, of which fuzzing changes a part."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxalign import models
from jaxalign.models.families import FAMILIES
from tests import folders_made, token_cases

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "eos_token_id": [0],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
HEAD = {"kind": "value", "hidden_size": 3, "distribution": {"support": [0.0, 1.0, 2.0], "mode": "grid", "rank": 2}}
GENERATION = {"eos_token_id": [0], "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "num_beams": 1}
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {},
    "alpha_pattern": {"q_proj": 3},
    "base_model_name_or_path": "../model",
}


def write_model(folder: pathlib.Path, config: dict[str, Any] = SMALL) -> None:
    lm = models.LanguageModel(models.config_from_hf(config))
    models.save(folder, lm, _params(lm), overwrite=True)
    (folder / "config.json").write_text(json.dumps(config))


@functools.cache
def _params(lm: models.LanguageModel) -> Any:
    import jax

    return lm.init(jax.random.key(0))


def config(folder: pathlib.Path) -> None:
    folders_made.write(folder, {"config.json": SMALL})


def families(folder: pathlib.Path) -> None:
    for name in FAMILIES:
        own = FAMILIES[name].names
        values = {own.get(k, k): v for k, v in SMALL.items() if own.get(k, k) is not None}
        values |= {"model_type": name, "architectures": None, "rope_parameters": None}
        values[own.get("hidden_size", "hidden_size")] = 16  # a quarter of a head is even
        values.pop("head_dim", None)
        folders_made.write(folder, {f"{name}/config.json": {**dict(FAMILIES[name].defaults), **values}})


def shards(folder: pathlib.Path) -> None:
    write_model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    folders_made.write(folder, {"model.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": names}})


def adapter(folder: pathlib.Path) -> None:
    write_model(folder / "model")
    place = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{place}A.weight": np.ones((2, 8), np.float32), f"{place}B.weight": np.ones((8, 2), np.float32)}
    folders_made.write(folder, {"adapter/adapter_config.json": ADAPTER})
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    token = {"content": "<pad>", "id": 3}
    folders_made.write(
        folder,
        {"adapter/tokenizer_config.json": {"pad_token": "<pad>"}, "adapter/tokenizer.json": {"added_tokens": [token]}},
    )


def tokenizer(folder: pathlib.Path) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": token_cases.CHATML}
    files = {"tokenizer.json": folders_made.tokenizer_json(), "tokenizer_config.json": settings, "config.json": SMALL}
    folders_made.write(folder, files | {"generation_config.json": {"eos_token_id": [2]}})


def bare_tokenizer(folder: pathlib.Path) -> None:
    files = {"tokenizer.json": folders_made.tokenizer_json(), "config.json": SMALL | {"bos_token_id": 1}}
    folders_made.write(folder, files | {"generation_config.json": {"eos_token_id": [2]}})

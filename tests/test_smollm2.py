"""The packaged model of real text: names, the order of rotated rows, the tokenizer (tests/real reads the file)."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from jaxalign.worlds import smollm2
from train import smollm2 as command


def test_rows_of_queries_and_keys_come_back_in_llamas_order():
    """GGUF's writer parts each head's rows in two halves and interleaves them."""
    heads, rows, width = 3, 24, 5
    llama = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    stored = llama.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
    assert not np.array_equal(stored, llama)
    np.testing.assert_array_equal(smollm2._rows_as_llama(stored, heads), llama)


def test_names():
    assert smollm2._name("token_embd.weight") == "model.embed_tokens.weight"
    assert smollm2._name("blk.7.attn_output.weight") == "model.layers.7.self_attn.o_proj.weight"
    assert smollm2._name("blk.29.ffn_norm.weight") == "model.layers.29.post_attention_layernorm.weight"


def test_the_tokenizer_parts_digits_and_keeps_special_tokens_whole():
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "12", "ab"]
    ids = {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}
    about = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()} | {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(words) - 3)],
        "tokenizer.ggml.merges": ["1 2", "a b"],
        "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
        "llama.context_length": 64,
    }
    made = smollm2._tokenizer(about)
    assert made.convert_ids_to_tokens(made("ab 12<|im_end|>").input_ids) == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id, made.unk_token_id) == (1, 2, 2, 0)
    assert made.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|im_end|>"


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'jaxalign\[real\]'\), found no gguf"):
        command.run(command.Config(out=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()

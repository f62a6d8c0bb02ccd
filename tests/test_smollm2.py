"""The packaged model of real text: names, the order of rotated rows, the tokenizer (tests/real reads the file)."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest

from jaxalign import models, text
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


def small_file():
    """(fields, tensors) of a GGUF file of one layer, and the words of its vocabulary."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters]
    ids = {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}
    about = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()} | {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(words) - 3)],
        "tokenizer.ggml.merges": [],
        "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.feed_forward_length": 24,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
    }
    shapes = {"token_embd.weight": (len(words), 16), "output_norm.weight": (16,)}
    shapes |= {f"blk.0.{name}.weight": (16,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.{name}.weight": (16, 16) for name in ("attn_q", "attn_output")}
    shapes |= {f"blk.0.{name}.weight": (8, 16) for name in ("attn_k", "attn_v")}
    shapes |= {f"blk.0.{name}.weight": (24, 16) for name in ("ffn_gate", "ffn_up")} | {
        "blk.0.ffn_down.weight": (16, 24)
    }
    rng = np.random.default_rng(0)
    return about, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_folder_is_whole_and_loads(tmp_path, monkeypatch):
    about, tensors = small_file()
    fields = {name: types.SimpleNamespace(contents=lambda value=value: value) for name, value in about.items()}
    stored = [types.SimpleNamespace(name=name, data=data, tensor_type=0) for name, data in tensors.items()]
    reader = types.SimpleNamespace(fields=fields, tensors=stored)
    made = types.SimpleNamespace(GGUFReader=lambda path: reader, dequantize=lambda data, kind: data)
    monkeypatch.setitem(sys.modules, "gguf", made)
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: tmp_path / "packaged.gguf")
    command.run(command.Config(out=str(tmp_path / "model")))
    lm, params = models.load(tmp_path / "model")
    assert (lm.config.num_heads, lm.config.num_kv_heads, lm.eos_ids, lm.config.pad_id) == (2, 1, (2,), 2)
    embedding = params["transformer"]["embedding"]
    np.testing.assert_array_equal(embedding, tensors["token_embd.weight"])
    tokenizer = models.tokenizer(tmp_path / "model")
    assert len(text.generate(lm, params, tokenizer, ["ab"], max_new_tokens=3).texts) == 1


def test_the_toy_is_of_the_same_form(tmp_path):
    command.run(command.Config(out=str(tmp_path / "model"), toy=True, seed=3))
    lm, params = models.load(tmp_path / "model")
    assert (lm.config.num_layers, lm.config.tie_embeddings, lm.eos_ids, lm.config.pad_id) == (2, True, (2,), 2)
    tokenizer = models.tokenizer(tmp_path / "model")
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, café 12!"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    wanted = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi, café 12!<|im_end|>\n<|im_start|>assistant\n"
    assert whole == wanted
    assert tokenizer.decode(tokenizer(whole).input_ids) == wanted
    assert len(text.generate(lm, params, tokenizer, [chat], max_new_tokens=3).texts) == 1
    with pytest.raises(ValueError, match=r"seed: expected with --toy, .* found 3"):
        command.run(command.Config(out=str(tmp_path / "other"), seed=3))


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

"""Folders of tokenizers and models as people have them, made in a test: one file here, one there."""

from __future__ import annotations

import functools
import io
import json
import pathlib
from typing import Any

from tests import token_cases

SENTENCES = ["hello you and me", "the cat sat on the mat", "Human: hello Assistant: yes I am fine"]


def write(folder: pathlib.Path, files: dict[str, Any]) -> pathlib.Path:
    """A folder of files: bytes and text as they are, all else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def tokenizer_json() -> str:
    """The tokenizer.json of byte-level BPE: no settings, no template."""
    return str(token_cases.byte_level().backend_tokenizer.to_str())


@functools.cache
def sentencepiece_model() -> bytes:
    """The tokenizer.model of a sentencepiece BPE with bytes for unknown characters, as Llama-2's."""
    import sentencepiece

    sink = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=sink,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    return sink.getvalue()

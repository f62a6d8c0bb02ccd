"""A file of odd rows of every form as token ids: each is right under every tokenizer and template, or it is named."""

from __future__ import annotations

import json

import pytest

from jaxalign import data, tokens
from tests import odd_rows
from tests import token_cases as cases

FORMATS = {
    "byte_level without a template": lambda: cases.byte_level(),
    "byte_level, ChatML": lambda: cases.byte_level(cases.CHATML),
    "byte_level, thinking, BOS and EOS added": lambda: cases.byte_level(cases.THINK, bos=True, eos=True),
    "byte_level that refuses a system turn": lambda: cases.byte_level(cases.NO_SYSTEM),
    "dummy space without a template": lambda: cases.dummy_space(),
    "dummy space, Llama-2": lambda: cases.dummy_space(cases.LLAMA2),
    "dummy space, Zephyr": lambda: cases.dummy_space(cases.ZEPHYR, eos=True),
}
READERS = {
    "pairs": lambda path, form: data.tokenize_pairs(path, form, max_length=4000, skip_bad=True),
    "texts": lambda path, form: data.tokenize_texts(path, form, max_length=4000, skip_bad=True),
    "prompts": lambda path, form: data.tokenize_prompts(path, form, skip_bad=True),
}
PLAIN = {
    "pairs": lambda path: data.read_pairs(path, skip_bad=True),
    "texts": lambda path: data.read_examples(path, skip_bad=True),
    "prompts": lambda path: data.read_prompts(path, skip_bad=True),
}


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "odd.jsonl"
    rows = [odd.row if isinstance(odd.row, bytes) else json.dumps(odd.row).encode() for odd in odd_rows.ROWS]
    path.write_bytes(b"\n".join(rows))
    return path


def contents(text):
    """What must be found in the tokens of a text or a chat: its words, without what templates strip
    or leave out."""
    if isinstance(text, str):
        return [text]
    kept = [m for m in text if isinstance(m.get("content"), str) and m["role"] in ("user", "assistant")]
    return [m["content"].split("</think>")[-1].strip() for m in kept]


def check_row(form, ids, *parts):
    """The tokens hold every content, and BOS once at their start where the tokenizer writes it."""
    written = tokens.decode_text(form.tokenizer, ids, special=True)
    for part in parts:
        for content in contents(part):
            if all(c in cases.LETTERS for c in content):  # others are unknown to the small sentencepiece-like one
                assert content in written
    if form.prefix:
        assert tuple(ids[: len(form.prefix)]) == form.prefix
        assert ids[len(form.prefix)] not in form.prefix


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", FORMATS)
def test_each_row_is_right_or_named(kind, name, odd_file):
    form = tokens.text_format(FORMATS[name]())
    found, read = READERS[kind](odd_file, form), PLAIN[kind](odd_file)
    chats = [row for row in read.rows if not all(isinstance(part, str | bool | None) for part in row[1:4])]
    assert len(found.rows) + found.skipped == len(read.rows) + read.skipped
    refused = found.skipped - read.skipped
    if form.tokenizer.chat_template is None:
        assert refused >= len({row.where for row in chats if kind != "pairs"})
    texts = {}
    for row in read.rows:
        texts.setdefault(row.where, []).append(row)
    for row in found.rows:
        given = texts[row.where].pop(0) if len(texts[row.where]) == 1 else None
        if kind == "prompts":
            check_row(form, row.tokens, *([given.prompt] if given else []))
            assert row.tokens[-1:] != [form.tokenizer.eos_token_id] or row.text.endswith("</s>")
            continue
        sides = [row.chosen, row.rejected] if kind == "pairs" else [row.response]
        ends = {*form.eos_ids, *form.specials}
        for side, ids in enumerate(sides):
            assert ids[-1] in ends
            parts = [] if given is None else [given.prompt, given[2 + side]]
            check_row(form, [*row.prompt, *ids], *parts)
    for reason in found.reasons:
        assert "odd.jsonl:" in reason
        assert ": expected " in reason

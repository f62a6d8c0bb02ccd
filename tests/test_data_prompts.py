"""Prompts from files: every form, every refusal with its file and line; and their batches."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import tokenizers
import transformers

from jaxalign import data, tokens
from jaxalign.data.tokenizers import word_level
from jaxalign.prompts import bucket, prompt_batch

WORDS = ["<s>", "the", "cat", "dog", "user", "assistant"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "the dog"}]


@pytest.fixture(scope="module")
def tokenizer():
    """Puts <s> before every text, as Llama's does, and has a template that writes <s> itself."""
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="cat")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    fast.chat_template = TEMPLATE
    return fast


def tokenized(path, tokenizer):
    return data.tokenize_prompts(path, tokens.text_format(tokenizer)).rows


def file(tmp_path, text: str | bytes, name: str = "p.jsonl"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def texts(prompts):
    return [prompt.text for prompt in prompts]


def read(path):
    return [row.prompt for row in data.read_prompts(path).rows]


def test_every_form(tmp_path, tokenizer):
    rows = "\n".join([json.dumps({"prompt": "the cat", "id": 3}), "", json.dumps({"messages": MESSAGES})]) + "\n"
    expected = ["the cat", "<s> user the dog assistant"]
    assert texts(tokenized(file(tmp_path, rows), tokenizer)) == expected
    assert texts(tokenized(file(tmp_path, gzip.compress(rows.encode()), "p.jsonl.gz"), tokenizer)) == expected
    for text in ("the cat\nthe dog\n", "the cat\nthe dog", "the cat\r\nthe dog\r\n", "\ufeffthe cat\nthe dog"):
        assert read(file(tmp_path, text, "p.txt")) == ["the cat", "the dog"]


def test_only_newlines_part_lines(tmp_path):
    """U+2028 and its kind may stand inside JSON text; str.splitlines would cut there."""
    prompts = ["the\u2028cat", "the\x85dog", "a\x0bb\x0cc\x1dd", "é"]
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
    assert read(file(tmp_path, text)) == prompts
    assert read(file(tmp_path, "the\u2028cat\nthe dog\n", "p.txt")) == ["the\u2028cat", "the dog"]


def test_special_tokens_come_from_the_tokenizer_or_from_the_template(tmp_path, tokenizer):
    rows = json.dumps({"prompt": "the cat"}) + "\n" + json.dumps({"messages": MESSAGES})
    plain, chat = tokenized(file(tmp_path, rows), tokenizer)
    assert plain[:3] == ("the cat", [0, 1, 2], "the cat")
    assert chat.tokens == [0, 4, 1, 3, 5]
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert chat.tokens == list(whole)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "JSON object"),
        ("[1]", "JSON object, found list"),
        ('{"text": "x"}', r"found fields \['text'\]"),
        ('{"prompt": "x", "messages": []}', "found fields"),
        ('{"prompt": 3}', "text in prompt, found int"),
        ('{"prompt": " "}', "empty"),
        ('{"messages": []}', "messages as"),
        ('{"messages": [3]}', "messages as"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the user speaks first"),
        (b'{"prompt": "\xe9"}', "UTF-8"),
    ],
)
def test_a_bad_line_is_named(line, reason, tmp_path, tokenizer):
    line = line.encode() if isinstance(line, str) else line
    path = file(tmp_path, b'{"prompt": "the cat"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"p\.jsonl:3: .*{reason}"):
        tokenized(path, tokenizer)


def test_bad_files_are_named(tmp_path):
    for text in ("the cat\n\nthe dog\n", "the cat\n  \n"):
        with pytest.raises(ValueError, match=r"p\.txt:2: .* empty"):
            data.read_prompts(file(tmp_path, text, "p.txt"))
    for text, name in (("", "p.jsonl"), ("\n", "p.jsonl"), ("", "p.txt")):
        with pytest.raises(ValueError, match=r"^prompts: expected at least one prompt"):
            data.read_prompts(file(tmp_path, text, name))
    with pytest.raises(ValueError, match=r"^prompts: .* found no such file"):
        data.read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"^prompts: .* found suffix '\.xml'"):
        data.read_prompts(file(tmp_path, "the cat\n", "p.xml"))
    whole = gzip.compress(b'{"prompt": "the cat"}\n')
    for broken in (b"the cat", whole[:-9], whole[:12] + b"\xff\xff" + whole[14:]):
        with pytest.raises(ValueError, match=r"^prompts: expected gzip"):
            data.read_prompts(file(tmp_path, broken, "p.jsonl.gz"))
    with pytest.raises(ValueError, match=r"p\.jsonl:1: .*chat template"):
        tokenized(file(tmp_path, json.dumps({"messages": MESSAGES})), word_level(WORDS))


def test_a_prompt_without_tokens_is_named(tmp_path):
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [] if text == "dog" else [1]}

    with pytest.raises(ValueError, match=r"p\.txt:2: expected at least one token"):
        tokenized(file(tmp_path, "cat\ndog\n", "p.txt"), tokenizer)


def test_buckets():
    assert [bucket(n) for n in (1, 8, 9, 12, 13, 17, 24, 25, 33)] == [8, 8, 12, 12, 16, 24, 24, 32, 48]
    sizes = sorted({bucket(n) for n in range(1, 4097)})
    assert len(sizes) == 19
    assert all(bucket(n) >= n for n in range(1, 4097))
    assert all(bucket(n) <= 1.5 * n for n in range(8, 4097))
    with pytest.raises(ValueError, match=r"^n: "):
        bucket(0)


def test_batches():
    batch = prompt_batch([[1, 2], [3]], index=[7, 4], batch_size=3, pad_id=9)
    np.testing.assert_array_equal(batch.tokens[:, -2:], [[1, 2], [9, 3], [9, 3]])
    np.testing.assert_array_equal(batch.mask.sum(1), [2, 1, 1])
    np.testing.assert_array_equal(batch.index, [7, 4, 4])
    assert batch.tokens.shape == (3, 8)
    assert prompt_batch([[1, 2, 3]], length=3).tokens.tolist() == [[1, 2, 3]]
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="sequences"):
            prompt_batch(bad)
    with pytest.raises(ValueError, match="length"):
        prompt_batch([[1, 2, 3]], length=2)
    with pytest.raises(ValueError, match="batch_size"):
        prompt_batch([[1], [2]], batch_size=1)
    with pytest.raises(ValueError, match="index"):
        prompt_batch([[1], [2]], index=[0])

"""Texts, a tokenizer of eleven words and what compares responses, for the tests of `jaxalign.text`."""

from __future__ import annotations

import jax
import numpy as np

from jaxalign import prompts
from jaxalign.data.tokenizers import word_level

TEXTS = ["a b c", "d", "e f g a b c d e f g", "b b", "c a"]
KEY = jax.random.key(3)


def chat_words():
    """A tokenizer of eleven words' ids, <eos> is 1; and a chat template."""
    tokenizer = word_level(["a", "b", "c", "d", "e", "f", "g", "h"])
    tokenizer.chat_template = (
        "{% for m in messages %} {{ m.content }}{% if m.role == 'assistant' %} <eos> h{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} {{ opening or 'h' }}{% endif %}"
        "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    )
    return tokenizer


def as_batch(tokenizer, texts):
    return prompts.prompt_batch([tokenizer(t)["input_ids"] for t in texts])


def assert_completions_equal(found, expected):
    for name in ("tokens", "mask", "finished", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5, err_msg=name)

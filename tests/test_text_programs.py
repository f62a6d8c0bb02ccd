"""Programs on texts get the same text from every function that takes them."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxalign import rewards, text
from jaxalign.data.tokenizers import word_level


@pytest.fixture(scope="module")
def words():
    return word_level(["a", "b", "c", "d", "e", "f", "g", "h"])


def test_a_text_that_is_lost_in_the_prompts_last_word_is_encoded_by_itself(words):
    """Words that go on without a space: both together are one unknown word, which is no id of a response."""
    seen = []

    def spy(prompts, responses):
        seen.append((prompts, responses))
        return [0.0 for _ in responses]

    text.score(spy, None, words, ["zap"], ["b"])
    assert seen[-1][1] == ["b"]


@pytest.mark.parametrize("given", ["tokenizer", "function"])
def test_a_program_gets_the_same_text_everywhere(given, words):
    """An EOS that ended a response is no text: of text.score, of a decoder, and of rewards.from_text."""
    seen = []

    def spy(prompts, responses):
        seen.append((list(prompts), list(responses)))
        return [float(len(response)) for response in responses]

    decode = words if given == "tokenizer" else (lambda ids: words.decode(ids, skip_special_tokens=True))
    reward = rewards.from_text(decode, spy)
    text.score(spy, None, words, ["a b"], ["c d"])
    tokens = jnp.asarray([[*words("a b")["input_ids"], *words("c d")["input_ids"], 1]])
    reward(None, tokens, jnp.ones_like(tokens, bool), jnp.asarray([2]), jnp.asarray([0]))
    assert seen[0] == seen[-1] == (["a b"], ["c d"])

"""Given responses as texts: their scores and log-probabilities are those of their tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from jaxalign import decoding, policies, rewards, text
from tests.conftest import tiny_lm
from tests.text_cases import KEY, TEXTS, as_batch, assert_completions_equal, chat_words


@pytest.fixture(scope="module")
def words():
    return chat_words()


@pytest.fixture(scope="module")
def model():
    return tiny_lm(0, num_layers=1, eos_ids=(1,))


def counted(params, tokens, mask, prompt_length, index):
    """10 for each response token, and the prompt's number."""
    return 10.0 * (mask.sum(axis=1) - prompt_length) + index + params


def test_scores_of_texts_in_any_batches(words):
    responses = ["a", "b c", "d e f", "a b c d e f g", "c"]
    lengths = np.array([len(r.split()) for r in responses])
    for batch_size in (1, 2, 32):
        found = text.score(counted, jnp.float32(0.5), words, TEXTS, responses, batch_size=batch_size)
        np.testing.assert_array_equal(found, 10.0 * (lengths + 1) + np.arange(5) + 0.5)
    found = text.score(counted, jnp.float32(0.5), words, TEXTS, responses, append_eos=False)
    np.testing.assert_array_equal(found, 10.0 * lengths + np.arange(5) + 0.5)
    # A model may end at once: an empty response is its EOS alone.
    np.testing.assert_array_equal(text.score(counted, jnp.float32(0.5), words, TEXTS[:2], ["", "a"]), [10.5, 21.5])


def test_a_function_of_texts_scores_them_without_special_tokens(words):
    seen = []

    def letters(prompts: list[str], responses: list[str]) -> list[float]:
        seen.extend(zip(prompts, responses, strict=True))
        return [float(len(response)) for response in responses]

    found = text.score(letters, None, words, ["a", "b"], ["c d", "e"], batch_size=2)
    np.testing.assert_array_equal(found, [3.0, 1.0])
    assert set(seen) == {("a", "c d"), ("b", "e")}


def test_a_reward_model_scores_a_text_as_it_scores_its_tokens(words):
    lm, params = tiny_lm(2, "reward", num_layers=1)
    found = text.score(rewards.from_model(lm), params, words, ["a b", "c"], ["d", "e f"])
    for value, written in zip(found, ["a b d <eos>", "c e f <eos>"], strict=True):
        hidden = lm.hidden(params, jnp.asarray([words(written)["input_ids"]]))
        np.testing.assert_allclose(value, lm.head(params, hidden)[0, -1, 0], rtol=1e-4, atol=1e-5)
    chat = [{"role": "user", "content": "a"}]  # "a h", then "b <eos>"; what the template writes after it is read too
    template = words.chat_template
    words.chat_template = template.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}h {% endif %}{{ m.content }}"
    )
    try:
        one = text.score(rewards.from_model(lm), params, words, [chat], ["b"])
    finally:
        words.chat_template = template
    hidden = lm.hidden(params, jnp.asarray([words("a h b <eos> h")["input_ids"]]))
    np.testing.assert_allclose(one, lm.head(params, hidden)[:, -1, 0], rtol=1e-4, atol=1e-5)


def test_log_prob_of_texts_is_that_of_their_tokens(model, words):
    lm, params = model
    policy = policies.language_model(lm)
    responses = ["a", "b c", "d e f", "g h", "c"]
    ids = [[*words(r)["input_ids"], 1] for r in responses]
    tokens, mask = np.zeros((5, 4), np.int32), np.zeros((5, 4), bool)
    for row, one in enumerate(ids):
        tokens[row, : len(one)], mask[row, : len(one)] = one, True
    given = (jnp.asarray(tokens), jnp.asarray(mask))
    expected = decoding.log_prob(policy, params, KEY, as_batch(words, TEXTS), *given, eos_ids=(1,))
    assert bool(expected.finished.all())
    for batch_size in (2, 32):
        found = text.log_prob(policy, params, words, TEXTS, responses, batch_size=batch_size)
        assert_completions_equal(found, expected)
    open_ended = text.log_prob(policy, params, words, TEXTS, responses, append_eos=False)
    assert not bool(open_ended.finished.any())
    np.testing.assert_array_equal(open_ended.mask.sum(axis=1), mask.sum(axis=1) - 1)


def test_bad_responses_are_named(words):
    def score(prompts, responses, **options):
        return text.score(counted, jnp.float32(0), words, prompts, responses, **options)

    for match, call in {
        "responses: expected a list of texts, found 'a'": lambda: score(["a"], "a"),
        "responses: expected one for each of 2 prompts, found 1": lambda: score(["a", "b"], ["a"]),
        r"responses\[1\]: expected a response token": lambda: score(["a", "b"], ["a", ""], append_eos=False),
        "batch_size": lambda: score(["a"], ["a"], batch_size=0),
        "expected one real number per text": lambda: text.score(
            lambda p, t, m, n, i: jnp.ones((1, 1)), None, words, ["a"], ["b"]
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    with pytest.raises(ValueError, match="eos_id: expected an id, since the tokenizer has no EOS"):
        text.score(counted, jnp.float32(0), plain, ["a"], ["a"])

"""Texts in and out: the draws of decoding.sample, batches, chats, streams, drafts, refusals by row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from jaxalign import critics, decoding, models, policies, text
from jaxalign.data.tokenizers import word_level
from tests.conftest import tiny_lm
from tests.test_data_prompts import MESSAGES, TEMPLATE
from tests.text_cases import KEY, TEXTS, as_batch, assert_completions_equal, chat_words


@pytest.fixture(scope="module")
def words():
    return chat_words()


@pytest.fixture(scope="module")
def model():
    return tiny_lm(0, num_layers=1, eos_ids=(1,))


@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
def test_the_draws_are_those_of_sample(temperature, model, words):
    lm, params = model
    found = text.generate(lm, params, words, TEXTS, rng=KEY, max_new_tokens=9, temperature=temperature)
    expected = decoding.sample(
        policies.language_model(lm),
        params,
        KEY,
        as_batch(words, TEXTS),
        max_new_tokens=9,
        eos_ids=lm.eos_ids,
        temperature=temperature,
    )
    assert_completions_equal(found.completions, expected)
    assert bool(expected.finished.any()) or temperature != 1.0
    for row, written in enumerate(found.texts):
        ids = np.asarray(expected.tokens[row])[np.asarray(expected.mask[row])]
        assert written == words.decode(ids.tolist(), skip_special_tokens=True)
        assert "<eos>" not in written


def test_batches_change_no_draw_and_keep_the_order(model, words):
    lm, params = model
    whole = text.generate(lm, params, words, TEXTS, rng=KEY, max_new_tokens=9)
    for batch_size in (1, 2, 4):
        parts = text.generate(lm, params, words, TEXTS, rng=KEY, max_new_tokens=9, batch_size=batch_size)
        assert parts.texts == whole.texts
        assert_completions_equal(parts.completions, whole.completions)


def test_deterministic_draws_are_those_of_any_batch_size(model, words):
    lm, params = model
    draw = lambda size: text.generate(  # noqa: E731
        lm, params, words, TEXTS, seed=3, max_new_tokens=5, batch_size=size, deterministic=2
    )
    jax.tree.map(np.testing.assert_array_equal, draw(1).completions, draw(32).completions)
    for other in ({"stream": print}, {"draft": (lm, params)}):
        with pytest.raises(ValueError, match="expected None with deterministic = 2"):
            text.generate(lm, params, words, TEXTS, deterministic=2, **other)


@pytest.mark.parametrize("every", [1, 4, 50])
def test_a_stream_draws_the_same_and_its_pieces_add_up(every, model, words):
    lm, params = model
    whole = text.generate(lm, params, words, TEXTS, rng=KEY, max_new_tokens=9)
    pieces: dict[int, list[str]] = {row: [] for row in range(len(TEXTS))}
    found = text.generate(
        lm,
        params,
        words,
        TEXTS,
        rng=KEY,
        max_new_tokens=9,
        batch_size=3,
        stream=lambda row, piece: pieces[row].append(piece),
        stream_every=every,
    )
    assert_completions_equal(found.completions, whole.completions)
    assert found.texts == whole.texts == ["".join(pieces[row]) for row in range(len(TEXTS))]
    assert all(piece for row in pieces.values() for piece in row)
    most = max(len(row) for row in pieces.values())
    assert most > 3 if every == 1 else most <= 3


def test_samples_are_numbered_and_the_first_is_that_of_one(model, words):
    lm, params = model
    one = text.generate(lm, params, words, TEXTS, seed=5, max_new_tokens=6)
    three = text.generate(lm, params, words, TEXTS, rng=jax.random.key(5), max_new_tokens=6, num_samples=3)
    assert [len(row) for row in three.texts] == [3] * 5
    assert [row[0] for row in three.texts] == one.texts
    assert three.completions.tokens.shape == (5, 3, 6)
    assert three.completions.finished.shape == (5, 3)
    assert_completions_equal(jax.tree.map(lambda x: x[:, 0], three.completions), one.completions)
    assert any(row[0] != row[1] for row in three.texts)
    single = text.generate(lm, params, words, TEXTS[:1], seed=5, max_new_tokens=6, num_samples=1)
    assert single.texts == [[one.texts[0]]]


def test_any_policy_with_a_beta_for_each_prompt(model, words):
    lm, params = model
    value, value_params = tiny_lm(1, "q", num_layers=1)
    policy = policies.tilt(policies.language_model(lm), critics.value(value))
    tilted = {"policy": params, "critic": value_params, "beta": jnp.linspace(0.1, 9, 5)}
    found = text.generate(policy, tilted, words, TEXTS, rng=KEY, max_new_tokens=5)
    expected = decoding.sample(policy, tilted, KEY, as_batch(words, TEXTS), max_new_tokens=5, eos_ids=(1,))
    assert_completions_equal(found.completions, expected)
    narrow = policies.top_k(policies.language_model(lm), 1)  # its parameters are the model's own
    greedy = text.generate(lm, params, words, TEXTS, max_new_tokens=5, temperature=0.0)
    assert text.generate(narrow, params, words, TEXTS, max_new_tokens=5).texts == greedy.texts
    # A temperature for each prompt, over several batches.
    heats = np.array([0.0, 1.0, 0.0, 0.5, 0.0])
    mixed = text.generate(lm, params, words, TEXTS, rng=KEY, max_new_tokens=5, temperature=heats, batch_size=2)
    for row in (0, 2, 4):
        assert mixed.texts[row] == greedy.texts[row]


def test_what_ends_a_response(model, words):
    """The ids given, the policy's, or the model's; the end is no text even where it is a word."""
    lm, params = model
    policy = policies.language_model(lm)._replace(eos_ids=(5,))
    other = policy._replace(eos_ids=(3,))
    for source, options in ((policy, {}), (lm, {"eos_ids": 5}), (other, {"eos_ids": [5]})):
        found = text.generate(source, params, words, TEXTS, rng=KEY, max_new_tokens=12, **options)
        ended = np.asarray(found.completions.finished)
        assert ended.any()
        for row in np.flatnonzero(ended):
            ids = np.asarray(found.completions.tokens[row])[np.asarray(found.completions.mask[row])]
            assert ids[-1] == 5
            assert 5 not in ids[:-1]
            assert "c" not in found.texts[row].split()


def test_three_lines_from_a_folder(model, words, tmp_path):
    models.save(tmp_path / "model", *model, tokenizer=words)
    lm, params = models.load(tmp_path / "model")
    tokenizer = models.tokenizer(tmp_path / "model")
    written = text.generate(lm, params, tokenizer, ["a b c"], max_new_tokens=6).texts
    assert written == text.generate(*model, words, ["a b c"], max_new_tokens=6).texts


def test_chats_go_through_the_template(model, words):
    lm, params = model
    chat = [{"role": "user", "content": "a b"}]
    found = text.generate(lm, params, words, [chat, "a b h"], rng=KEY, max_new_tokens=4, temperature=0.0)
    assert found.texts[0] == found.texts[1]  # the template writes "a b h"
    options = {"chat_template_kwargs": {"opening": "d"}, "temperature": 0.0, "max_new_tokens": 4}
    found = text.generate(lm, params, words, [chat, "a b d"], **options)
    assert found.texts[0] == found.texts[1]


def test_a_bos_comes_once(model):
    """From the tokenizer for a text, from the template for a chat."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["<s>", "the", "dog"])}, "the"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    fast.chat_template = TEMPLATE
    seen = []

    def lookup(params, tokens, mask, prompt_length, index):
        jax.debug.callback(lambda t, m: seen.append(np.asarray(t)[np.asarray(m)].tolist()), tokens, mask)
        return prompt_length.astype(float)

    lengths = text.score(lookup, None, fast, ["the dog", MESSAGES], ["dog", "dog"], append_eos=False, batch_size=1)
    jax.effects_barrier()
    assert lengths.tolist() == [3, 5]
    assert [row.count(0) for row in seen] == [1, 1]


def test_a_piece_is_never_taken_back(model, words):
    """Where a tokenizer changes text that stands already, what was given stays, and nothing false follows it."""

    class Shouting:
        """Writes the whole text in capitals from its third word on."""

        def __call__(self, text, **options):
            return words(text, **options)

        def get_vocab(self):
            return words.get_vocab()

        def decode(self, ids, **options):
            written = words.decode(ids, **options)
            return written.upper() if len(ids) > 2 else written

    pieces: list[str] = []
    text.generate(
        *model,
        Shouting(),
        ["a"],
        seed=1,
        max_new_tokens=9,
        stream=lambda row, piece: pieces.append(piece),
        stream_every=1,
    )
    assert pieces
    assert "".join(pieces).islower()


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "items", "options"),
    [
        (r"prompts: expected a list of texts, found one text 'a b'; put it in a list", "a b", {}),
        (r"prompts: expected a list of chats, found the messages of one chat", MESSAGES, {}),
        (r"prompts: expected at least one, found none", [], {}),
        (r"prompts: expected a list of texts or chats, found int", 3, {}),
        (r"prompts\[1\]: expected a text, found an empty one", ["a", ""], {}),
        (r"prompts\[1\]: expected at least one token, found none in '  '", ["a", "  "], {}),
        (r"prompts\[1\]: expected a text or a list of messages, found int", ["a", 3], {}),
        (r"prompts\[0\]: expected messages as", [[]], {}),
        (r"prompts\[1\]: .* the user speaks first", ["a", [{"role": "system", "content": "b"}]], {}),
        (r"prompts\[1\]: expected at most 60 tokens, .* context of 64, found 61", ["a", "a " * 61], {}),
        (r"max_new_tokens: expected an integer, at least 1, found 0", ["a"], {"max_new_tokens": 0}),
        (r"batch_size: expected an integer, at least 1", ["a"], {"batch_size": 0}),
        (r"stream_every: expected an integer", ["a"], {"stream_every": 1.5}),
        (r"num_samples: expected an integer", ["a"], {"num_samples": True}),
        (r"stream: expected None with num_samples", ["a"], {"num_samples": 2, "stream": print}),
        (r"temperature: expected one value, or one for each of 1 prompts", ["a"], {"temperature": jnp.ones(2)}),
        (r"temperature: expected a value >= 0", ["a"], {"temperature": -1.0}),
        (r"eos_ids: expected ids in \[0, 11\)", ["a"], {"eos_ids": 11}),
        (r"chat_template_kwargs: expected chats among the prompts", ["a"], {"chat_template_kwargs": {"x": 1}}),
        (r"seed: expected None beside rng", ["a"], {"seed": 1, "rng": KEY}),
        (r"rng: expected a jax key as of jax.random.key\(0\), found 1; seed= takes", ["a"], {"rng": 1}),
    ],
)
def test_bad_requests_are_named(match, items, options, model, words):
    with pytest.raises(ValueError, match=match):
        text.generate(*model, words, items, **{"max_new_tokens": 4} | options)


def test_bad_tokenizers_and_policies_are_named(model, words):
    lm, params = model
    wide = word_level([*"abcdefghi"])
    for call in (
        lambda: text.generate(lm, params, wide, ["a"]),
        lambda: text.log_prob(policies.language_model(lm), params, wide, ["a"], ["b"]),
    ):
        with pytest.raises(ValueError, match="tokenizer: expected ids below the model's 11 tokens, found ids up to 11"):
            call()
    with pytest.raises(ValueError, match="tokenizer: expected a tokenizer"):
        text.generate(lm, params, "FOLDER", ["a"])
    other = policies.language_model(models.LanguageModel(dataclasses.replace(lm.config, vocab_size=5)))
    with pytest.raises(ValueError, match="tokenizer: expected ids below the model's 5 tokens, found ids up to"):
        text.generate(other, params, words, ["a"], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"model: expected a language model or a Policy, .*, found None"):
        text.generate(None, params, words, ["a"])
    with pytest.raises(ValueError, match=r"expected a language model, found Critic"):
        text.generate(critics.value(tiny_lm(1, "q", num_layers=1)[0]), params, words, ["a"])
    # A Policy says itself what does not fit, before anything is drawn; one that names no EOS needs eos_ids.
    policy, drawn = policies.language_model(lm), []
    with pytest.raises(ValueError, match=r"within the model's context of 64, found a prompt of 61 tokens"):
        text.generate(
            policy, params, words, ["a", "a " * 61], batch_size=1, max_new_tokens=4, stream=lambda *x: drawn.append(x)
        )
    assert not drawn
    with pytest.raises(ValueError, match="eos_ids: expected an id or ids, since this policy does not name its own"):
        text.generate(policy._replace(eos_ids=None), params, words, ["a"], max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens: expected fewer than the model's context of 64 tokens"):
        text.generate(lm, params, words, ["a"], max_new_tokens=64)
    plain = word_level(["a"])
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected a tokenizer with a chat template"):
        text.generate(lm, params, plain, [[{"role": "user", "content": "a"}]], max_new_tokens=4)


# With a draft ---------------------------------------------------------------------------------------------------------


def test_a_draft_proposes_and_the_responses_are_those_of_speculation(model, words):
    """Of a model, a Policy and the policy below a tilt; batches change no draw, and greedy texts are the model's."""
    lm, params = model
    small, own = tiny_lm(5, num_layers=1, eos_ids=(1,))
    policy = policies.language_model(lm)
    found = text.generate(
        lm, params, words, TEXTS, rng=KEY, max_new_tokens=9, draft=(small, own), draft_tokens=3, batch_size=2
    )
    expected = decoding.speculative(
        policy,
        policies.language_model(small),
        {"target": params, "draft": own},
        KEY,
        as_batch(words, TEXTS),
        draft_tokens=3,
        max_new_tokens=9,
    )
    assert_completions_equal(found.completions, expected.completions)
    for row, written in enumerate(found.texts):
        ids = np.asarray(expected.completions.tokens[row])[np.asarray(expected.completions.mask[row])]
        assert written == words.decode(ids.tolist(), skip_special_tokens=True)
    plain = text.generate(lm, params, words, TEXTS, rng=KEY, max_new_tokens=9)
    assert plain.texts != found.texts  # other draws of the same law
    for draft in ((policies.language_model(small), own), (lm, params)):
        cold = text.generate(lm, params, words, TEXTS, max_new_tokens=9, temperature=0.0, draft=draft)
        assert cold.texts == text.generate(lm, params, words, TEXTS, max_new_tokens=9, temperature=0.0).texts


def test_a_drafts_law_is_the_models(model, words):
    """4,000 draws of one prompt's first token beside its probabilities: of 11 cells 40 has a probability of 2e-5."""
    lm, params = model
    small, own = tiny_lm(5, num_layers=1, eos_ids=(1,))
    found = text.generate(
        lm, params, words, ["a b c"] * 4000, max_new_tokens=2, draft=(small, own), draft_tokens=1, batch_size=4000
    )
    second = policies.language_model(lm)
    prompt = as_batch(words, ["a b c"])
    state, output = second.init(params, KEY, prompt, 2)
    first = np.exp(np.asarray(output.log_prob)[0])
    expected = np.zeros(11)
    for token in range(11):
        after = second.step(params, KEY, state, jnp.array([token]))[1]
        expected += first[token] * np.exp(np.asarray(after.log_prob)[0]) * (token != 1)
    tokens, mask = np.asarray(found.completions.tokens), np.asarray(found.completions.mask)
    for place, law in ((0, first), (1, expected)):
        count = np.bincount(tokens[mask[:, place], place], minlength=11)
        assert ((count - 4000 * law) ** 2 / np.maximum(4000 * law, 1e-9)).sum() < 40


def test_what_a_draft_refuses(model, words):
    lm, params = model
    for given, match in (
        ({"draft": (lm, params), "num_samples": 2}, "num_samples: expected None with a draft, found 2"),
        ({"draft": (lm, params), "stream": lambda row, new: None}, "stream: expected None with a draft"),
        ({"draft": "above"}, r"draft: expected \(model, params\) or 'below', found 'above'"),
        ({"draft": lm}, r"draft: expected \(model, params\) or 'below', found a LanguageModel"),
        ({"draft": (params, lm)}, "draft: expected a language model or a Policy, found a dict"),
        ({"draft": (lm, params), "draft_tokens": 0}, "draft_tokens: expected .*1, found 0"),
        ({"draft": "below"}, "draft: expected a Policy, found .below. with a target that is no tilt"),
    ):
        with pytest.raises(ValueError, match=match):
            text.generate(lm, params, words, TEXTS, max_new_tokens=4, **given)

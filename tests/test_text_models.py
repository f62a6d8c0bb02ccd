"""Reward models with a tokenizer of their own, and programs that get the prompts in the form that they ask for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, prompt_batch, rewards, text, tokens
from jaxalign.rewards.params import WeightedSumParams
from tests import token_cases as cases
from tests.conftest import tiny_lm

CHATS = [
    [{"role": "user", "content": "How are you?"}],
    [{"role": "system", "content": "Yes."}, {"role": "user", "content": "What is the capital of France?"}],
]
PLAIN = ["hello there", "One two"]
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def base():
    """A language model over a byte-level vocabulary with ChatML."""
    tokenizer = cases.byte_level(cases.CHATML)
    return tokenizer, *tiny_lm(0, num_layers=1, vocab_size=len(tokenizer), eos_ids=(4,), max_length=128)


@pytest.fixture(scope="module")
def judge():
    """A reward model over another vocabulary, with another template."""
    tokenizer = cases.dummy_space(cases.ZEPHYR)
    lm, params = tiny_lm(1, "reward", num_layers=1, vocab_size=len(tokenizer), eos_ids=(2,), max_length=128)
    return tokenizer, lm, params


def scored(judge, sources, responses):
    """The judge's own reading of whole conversations."""
    tokenizer, lm, params = judge
    chats = [[{"role": "user", "content": s}] if isinstance(s, str) else s for s in sources]
    return text.score(rewards.from_model(lm), params, tokenizer, chats, responses)


def decoder(tokenizer):
    return lambda ids: tokens.decode_text(tokenizer, ids)


def reward_of(base, judge, sources, **options):
    tokenizer, lm, params = judge
    read = rewards.text_model(rewards.from_model(lm), params, tokens.text_format(tokenizer), max_length=128, **options)
    return rewards.from_text(decoder(base[0]), read, sources=sources)


def test_texts_are_scored_as_the_models_own_conversations(judge):
    tokenizer, lm, params = judge
    read = rewards.text_model(
        rewards.from_model(lm), params, tokens.text_format(tokenizer), max_length=128, batch_size=2
    )
    sources, responses = [*CHATS, *PLAIN, CHATS[0]], ["I am fine.", "Paris.", " Yes", "", "I am fine."]
    expected = scored(judge, sources, responses)
    for _ in range(2):  # the second time from what is kept
        np.testing.assert_allclose(read(sources, responses), expected, rtol=1e-4, atol=1e-5)
    ids = tokenizer.apply_chat_template([*CHATS[0], {"role": "assistant", "content": "I am fine."}], tokenize=True)[
        "input_ids"
    ]
    whole = jnp.asarray([[1, *ids]])  # the tokenizer's BOS, which the template does not write
    np.testing.assert_allclose(expected[0], lm.head(params, lm.hidden(params, whole))[0, -1, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 2])
def test_best_of_n_picks_by_another_tokenizers_model(base, judge, chunk):
    tokenizer, lm, params = base
    form = tokens.text_format(tokenizer)
    prompts = prompt_batch([tokens.encode_prompt(form, chat).ids for chat in CHATS])
    reward = reward_of(base, judge, CHATS)
    found = decoding.best_of_n(
        policies.language_model(lm),
        reward,
        {"policy": params, "reward": None},
        KEY,
        prompts,
        num_samples=4,
        max_new_tokens=6,
        chunk=chunk,
    )
    plain = decoding.sample(policies.language_model(lm), params, KEY, prompts, max_new_tokens=6, num_samples=4)
    np.testing.assert_array_equal(found.info.samples.tokens, plain.tokens)
    for b, chat in enumerate(CHATS):
        texts = [
            tokens.decode_text(tokenizer, np.asarray(t)[np.asarray(m)])
            for t, m in zip(plain.tokens[b], plain.mask[b], strict=True)
        ]
        expected = scored(judge, [chat] * 4, texts)
        np.testing.assert_allclose(found.info.reward[b], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.completions.tokens[b], plain.tokens[b, int(np.argmax(expected))])


def test_sums_and_maps_keep_it(base, judge):
    reward = reward_of(base, judge, CHATS)
    length = rewards.from_text(decoder(base[0]), lambda prompts, responses: [float(len(r)) for r in responses])
    both = rewards.weighted_sum([reward, length])
    mapped = rewards.map_reward(both, lambda params, r, index: 2 * r)
    assert rewards.on_host(both)
    assert rewards.on_host(mapped)
    assert not rewards.on_host(length)
    form = tokens.text_format(base[0])
    row = tokens.encode_pair(form, CHATS[0], "I am fine.")
    ids = jnp.asarray([[*row.prompt, *row.response, *row.closing]])
    args = (ids, jnp.ones(ids.shape, bool), jnp.asarray([len(row.prompt)]), jnp.asarray([0]))
    one = scored(judge, CHATS[:1], ["I am fine."])
    params = WeightedSumParams((None, None), jnp.asarray([1.0, 0.5]))
    np.testing.assert_allclose(both(params, *args), one + 5.0, rtol=1e-4)
    np.testing.assert_allclose(mapped({"reward": params, "map": {}}, *args), 2 * (one + 5.0), rtol=1e-4)
    with pytest.raises(ValueError, match="reward: expected to be called outside jit"):
        jax.jit(reward)(None, *args)


METHODS = {  # decoder -> (entries of params beside policy and reward, keywords)
    "smc": ({"beta": 1.0}, {"num_particles": 2}),
    "cards": ({"entropy_threshold": 1.0, "reward_threshold": 0.0, "beta": 1.0}, {}),
    "quest": ({"beta": 1.0}, {"num_steps": 2}),
    "rejection": ({"beta": 1.0, "bound": 1.0}, {"max_tries": 2}),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_score_tokens_refuse_it_by_name(base, judge, method):
    _, lm, params = base
    entries, options = METHODS[method]
    with pytest.raises(ValueError, match=r"found one that reads whole texts .* decoding.best_of_n"):
        getattr(decoding, method)(
            policies.language_model(lm),
            reward_of(base, judge, CHATS),
            {"policy": params, "reward": None, **entries},
            KEY,
            prompt_batch([[5, 6]]),
            max_new_tokens=3,
            **options,
        )


def test_programs_get_the_prompts_that_they_ask_for(base):
    tokenizer, _, _ = base
    form = tokens.text_format(tokenizer)
    seen = {}

    def prompts_of(prompts, responses):
        seen["prompts"] = prompts
        return [0.0] * len(responses)

    def rendered_of(rendered, responses):
        seen["rendered"] = rendered
        return [0.0] * len(responses)

    def messages_of(messages, responses):
        seen["messages"] = messages
        return [0.0] * len(responses)

    def sources_of(sources, responses):
        seen["sources"] = sources
        return [0.0] * len(responses)

    sources = [CHATS[0], "hello"]
    rows = [tokens.encode_pair(form, s, "Yes") for s in sources]
    width = max(len(r.prompt) + len(r.response) for r in rows)
    ids, mask = np.zeros((2, width), np.int32), np.zeros((2, width), bool)
    for b, row in enumerate(rows):
        n = len(row.prompt) + len(row.response)
        ids[b, :n], mask[b, :n] = [*row.prompt, *row.response], True
    args = (ids, mask, np.asarray([len(r.prompt) for r in rows]), np.asarray([0, 1]))
    whole = lambda x: tokenizer.decode(x)  # noqa: E731
    for f in (prompts_of, rendered_of, messages_of, sources_of):
        rewards.from_text(decoder(tokenizer), f, sources=sources, rendered=whole)(None, *args).block_until_ready()
    assert seen["prompts"] == ["user\nHow are you?\nassistant\n", "hello"]
    assert seen["rendered"][0] == "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    assert seen["messages"] == [CHATS[0], [{"role": "user", "content": "hello"}]]
    assert seen["sources"] == sources
    for f, name in ((messages_of, "sources"), (sources_of, "sources"), (rendered_of, "rendered")):
        with pytest.raises(ValueError, match=f"{name}: expected .*{f.__name__} asks for"):
            rewards.from_text(decoder(tokenizer), f)


def test_what_cannot_be_scored_is_named(base, judge):
    tokenizer, lm, params = judge
    short = rewards.text_model(rewards.from_model(lm), params, tokens.text_format(tokenizer), max_length=24)
    long = [{"role": "user", "content": "one two three four five six seven eight nine ten"}]
    with pytest.warns(UserWarning, match="longer than the reward model's context"):
        value = short([long], ["Yes"])
    assert np.isfinite(value).all()
    with pytest.raises(ValueError, match="reward: row 1: expected room for the prompt's header"):
        short([CHATS[0], long], ["Yes", "one two three four five six seven eight nine ten one two three four five"])
    reward = reward_of(base, judge, CHATS)
    args = (jnp.asarray([[5, 6]]), jnp.ones((1, 2), bool), jnp.asarray([1]), jnp.asarray([9]))
    with pytest.raises(ValueError, match=r"index: expected below 2, one of the prompts given, found \[9\]"):
        reward(None, *args)

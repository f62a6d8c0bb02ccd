"""One habit for all decoders: params, end ids, several samples, rewards of texts, prompts as strings, and guards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, rewards
from jaxalign.types import Critic, Decoded
from tests.conftest import EOS, PROMPTS, needs_jit, padded, tiny_lm

RNG = jax.random.key(0)
LM, BASE = tiny_lm(0, num_layers=1)
POLICY = policies.language_model(LM)._replace(eos_ids=EOS)
SHARED = {"max_new_tokens": 3}
BOUNDS = {"beta": 1.0, "bound": 50.0, "reward_threshold": 1.0, "entropy_threshold": 2.0}
CALLS = {
    "best_of_n": ((), {"num_samples": 2}),
    "rejection": (("beta", "bound"), {"max_tries": 2}),
    "first_above": (("reward_threshold",), {"max_tries": 2}),
    "smc": (("beta",), {"num_particles": 2}),
    "quest": (("beta",), {"num_steps": 2}),
    "cards": (("beta", "reward_threshold", "entropy_threshold"), {"max_tries": 2}),
}


def length(params, tokens, mask, prompt_length, index):
    return mask.sum(axis=1).astype(jnp.float32)


def call(name, reward=length, prompts=None, **changes):
    entries, options = CALLS[name]
    params = {"policy": BASE, "reward": None} | {entry: BOUNDS[entry] for entry in entries}
    params = changes.pop("params", params)
    prompts = padded(PROMPTS) if prompts is None else prompts
    return getattr(decoding, name)(POLICY, reward, params, RNG, prompts, **{**SHARED, **options, **changes})


class Tokenizer:
    """Ids as words: "3 4" is [3, 4]."""

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(map(str, ids))


TOKENIZER = Tokenizer()
TEXTS = [" ".join(map(str, prompt)) for prompt in PROMPTS]


def words(prompts, responses):
    return [len(response.split()) + len(prompt.split()) for prompt, response in zip(prompts, responses, strict=True)]


# What is common to all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_decoder_takes_named_tuples_texts_and_strings(name):
    """A NamedTuple of params, a reward of texts and prompts as strings decode what the dict, the reward of tokens and
    the batch do, and every result is a Decoded with a KL per prompt."""
    plain = call(name)
    assert isinstance(plain, Decoded)
    assert plain.completions.tokens.shape == (5, 3)
    assert plain.kl.value.shape == (5,)
    kind = {"first_above": "FirstAboveParams", "best_of_n": "BestOfNParams", "smc": "SMCParams"}
    entries = {entry: BOUNDS[entry] for entry in CALLS[name][0]}
    params = getattr(decoding, kind.get(name, f"{name.capitalize()}Params"))(policy=BASE, reward=None, **entries)
    texts = call(name, words, TEXTS, params=params, tokenizer=TOKENIZER)
    np.testing.assert_array_equal(texts.completions.tokens, plain.completions.tokens)
    np.testing.assert_allclose(texts.info.reward, plain.info.reward)
    without = call(name, words, params={"policy": BASE} | entries, tokenizer=lambda ids: " ".join(map(str, ids)))
    np.testing.assert_array_equal(without.completions.tokens, plain.completions.tokens)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("reward", "found"),
    [
        (lambda p, t, m, n, i: jnp.zeros((len(t), 1)), r"shape \(\d+, 1\)"),
        (lambda p, t, m, n, i: jnp.zeros(()), r"shape \(\)"),
        (lambda p, t, m, n, i: jnp.zeros(len(t) + 1), r"shape \(\d+,\)"),
        (lambda p, t, m, n, i: jnp.zeros(len(t), jnp.complex64), "complex64"),
        (lambda p, t, m, n, i: jnp.zeros(len(t), bool), "bool"),
        (lambda p, t, m, n, i: None, "NoneType"),
    ],
    ids=["column", "scalar", "longer", "complex", "bool", "none"],
)
def test_what_a_reward_returns_is_checked_and_its_function_named(name, reward, found):
    with pytest.raises(ValueError, match=rf"<lambda>.*expected one real number per text.*found .*{found}"):
        call(name, reward)


@pytest.mark.parametrize("name", CALLS)
def test_bad_requests_name_their_argument(name):
    count = next(iter(CALLS[name][1]))
    cases = [
        ({count: 2.0}, f"{count}: expected an int, found 2.0"),
        ({count: True}, f"{count}: expected an int, found True"),
        ({count: -1}, f"{count}: expected at least"),
        ({"max_new_tokens": 3.0}, "max_new_tokens: expected an int, found 3.0"),
        ({"max_new_tokens": True}, "max_new_tokens: expected an int, found True"),
        ({"temperature": float("nan")}, "temperature: expected a value >= 0"),
        ({"temperature": -1.0}, "temperature: expected a value >= 0"),
        ({"temperature": jnp.ones(3)}, r"temperature: expected a scalar or shape \(5,\)"),
        ({"temperature": "hot"}, "temperature: expected real numbers"),
        ({"eos_ids": "0"}, "eos_ids: expected an int or a sequence of ints"),
        ({"eos_ids": 0.0}, "eos_ids: expected an int, found 0.0"),
        ({"prompts": PROMPTS}, "prompts: expected a TokenBatch, found list; prompts.prompt_batch"),
        ({"prompts": np.ones((2, 3), np.int32)}, "prompts: expected a TokenBatch, found ndarray"),
        (
            {"prompts": padded(PROMPTS)._replace(index=jnp.arange(5.0))},
            r"expected an index of integers \[B\], found dtype float32",
        ),
        ({"prompts": TEXTS}, r"prompt_batch\) or strings with tokenizer="),
        ({"prompts": TEXTS[0], "tokenizer": TOKENIZER}, "prompts: expected a list of strings"),
        ({"prompts": [*TEXTS, 3], "tokenizer": TOKENIZER}, "prompts: expected a list of strings"),
        ({"params": {"policy": BASE, "reward": None, "betta": 1.0}}, "params: expected"),
        ({"params": [BASE]}, "params: expected entries policy, .*; found list"),
        ({"reward": words}, r"reward: expected tokenizer= for .*words\(prompts, responses\)"),
        ({"reward": 3}, "reward: expected a Reward, found int"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            call(name, **changes)
    entries = {entry: BOUNDS[entry] for entry in CALLS[name][0]}
    with pytest.raises(ValueError, match=r"params: expected entries .*; found .*unknown extra"):
        call(name, params={"policy": BASE, "reward": None, "extra": 1.0} | entries)


@needs_jit
def test_inline_calls_compile_once():
    """A reward of texts and a temperature, built anew in each of three calls, are traced in the first alone."""
    traces = []

    def init(*arguments):
        traces.append(1)
        return POLICY.init(*arguments)

    counted = POLICY._replace(init=init)
    counts = []
    for seed in range(3):
        decoding.best_of_n(
            counted,
            words,
            {"policy": BASE},
            jax.random.key(seed),
            padded(PROMPTS),
            num_samples=np.int64(2),
            temperature=jnp.asarray(0.5 + seed),
            eos_ids=[0],
            tokenizer=TOKENIZER,
            **SHARED,
        )
        counts.append(len(traces))
    assert counts == [1, 1, 1]


# Sampling -------------------------------------------------------------------------------------------------------------


def test_several_samples_share_the_streams_of_best_of_n():
    prompts = padded(PROMPTS)
    one = decoding.sample(POLICY, BASE, RNG, prompts, **SHARED)
    many = decoding.sample(POLICY, BASE, RNG, prompts, num_samples=3, **SHARED)
    assert many.tokens.shape == (5, 3, 3)
    np.testing.assert_array_equal(many.tokens[:, 0], one.tokens)
    np.testing.assert_array_equal(many.tokens, call("best_of_n", num_samples=3).info.samples.tokens)
    single = decoding.sample(POLICY, BASE, RNG, prompts, num_samples=1, **SHARED)
    np.testing.assert_array_equal(single.tokens[:, 0], one.tokens)
    for bad, message in ((0, "at least 1, found 0"), (1.5, "an int, found 1.5")):
        with pytest.raises(ValueError, match=f"num_samples: expected {message}"):
            decoding.sample(POLICY, BASE, RNG, prompts, num_samples=bad, **SHARED)


def test_end_ids_are_the_policys_one_or_several():
    prompts = padded(PROMPTS)
    given = decoding.sample(POLICY, BASE, RNG, prompts, eos_ids=EOS, **SHARED)
    for ids in (None, 0, np.int32(0), [0], np.array([0])):
        found = decoding.sample(POLICY, BASE, RNG, prompts, eos_ids=ids, **SHARED)
        np.testing.assert_array_equal(found.finished, given.finished)
    unknown = POLICY._replace(eos_ids=None)
    with pytest.raises(ValueError, match=r"eos_ids: expected an id or ids, .*found None; \(\) for"):
        decoding.sample(unknown, BASE, RNG, prompts, **SHARED)
    assert not decoding.sample(unknown, BASE, RNG, prompts, eos_ids=(), **SHARED).finished.any()


@pytest.mark.parametrize("read", [decoding.log_prob, decoding.draw_margins])
def test_given_responses_are_checked(read):
    tokens, mask = jnp.full((5, 2), 3), jnp.ones((5, 2), bool)
    for changed, message in (
        ((tokens[:, 0], mask), r"tokens, mask: expected one shape \[B,T\], found \(5,\) and \(5, 2\)"),
        ((tokens + 0.5, mask), "tokens: expected integer ids, found dtype float32"),
        ((tokens, mask + 0.5), "mask: expected bool, found dtype float32"),
        ((tokens, mask.at[1, 0].set(False)), r"mask: expected right-padded responses, .* in rows \[1\]"),
        ((tokens[:3], mask[:3]), "tokens: expected one response per prompt, 5, found 3"),
        ((tokens + 9, mask), r"tokens: expected ids in \[0, 11\), found ids from 12 to 12"),
    ):
        with pytest.raises(ValueError, match=message):
            read(POLICY, BASE, RNG, padded(PROMPTS), *changed)


# Blockwise ------------------------------------------------------------------------------------------------------------


def test_blockwise_gives_its_bound_and_refuses_scores_of_another_shape():
    judge, judged = tiny_lm(1, "reward", num_layers=1)
    params = decoding.BlockwiseParams(BASE, judged)
    options = {"num_samples": 3, "block_size": 2, "max_new_tokens": 3}
    found = decoding.blockwise(POLICY, critics.args(judge), params, RNG, padded(PROMPTS), **options)
    blocks = np.ceil(np.asarray(found.completions.mask).sum(axis=1) / 2)
    np.testing.assert_array_equal(found.info.blocks, blocks)
    np.testing.assert_allclose(found.kl.value, blocks * (np.log(3) - 2 / 3), rtol=1e-6)
    text = decoding.join(padded(PROMPTS), found.completions)
    score = rewards.from_model(judge)(judged, *text, jnp.arange(5))
    np.testing.assert_allclose(found.info.score, score, rtol=1e-4, atol=1e-5)
    wrong = Critic(
        lambda *arguments: jnp.zeros(5),
        lambda p, r, state, o, c: (jnp.zeros(len(c)), state),
        lambda p, proposal, c: proposal,
        "level",
    )
    with pytest.raises(ValueError, match=r"critic\.score .*: q: expected shape \(15, 1\), .*, found \(15,\)"):
        decoding.blockwise(POLICY, wrong, {"policy": BASE, "critic": None}, RNG, padded(PROMPTS), **options)

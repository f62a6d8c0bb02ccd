"""Functions from tokens to logits as Policies: the laws, the numbers of the model itself, and refusals by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, rewards, testing
from tests.cases import tiny_lm
from tests.conftest import EOS, PROMPTS, VOCAB, padded

LM, PARAMS = tiny_lm(0)
WEIGHTS = jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))


def apply(params, tokens, mask):
    """The tiny model; padding has logits that would show."""
    return jnp.where(mask[..., None], LM.apply(params, tokens, mask=mask).logits, jnp.nan)


def decayed(params, tokens, mask):
    """A recurrent table: the sum of the rows of all tokens so far, each step halved."""

    def move(state, xs):
        token, real = xs
        state = jnp.where(real[:, None], state / 2 + params[token], state)
        return state, state

    moved = jax.lax.scan(move, jnp.zeros((tokens.shape[0], VOCAB)), (tokens.T, mask.T))[1]
    return jnp.moveaxis(moved, 0, 1)


def prefill(params, tokens, mask, capacity):
    every = decayed(params, tokens, mask)[:, -1]
    return every, every


def step(params, cache, token):
    cache = cache / 2 + params[token]
    return cache, cache


def test_a_model_without_a_cache_has_the_models_numbers():
    policy, plain = policies.from_apply(apply, vocab_size=VOCAB, eos_ids=EOS), policies.language_model(LM)
    draw = lambda p, side: decoding.sample(  # noqa: E731
        p, PARAMS, jax.random.key(1), padded(PROMPTS, side=side), max_new_tokens=4
    )
    found, right, expected = draw(policy, "left"), draw(policy, "right"), draw(plain, "left")
    for one in (found, right):
        np.testing.assert_array_equal(one.tokens, expected.tokens)
        np.testing.assert_allclose(one.log_prob, expected.log_prob, rtol=1e-4, atol=1e-5)
    again = decoding.log_prob(policy, PARAMS, jax.random.key(0), padded(PROMPTS), found.tokens, found.mask)
    np.testing.assert_allclose(again.log_prob, found.log_prob, rtol=1e-4, atol=1e-5)

    def total(table):  # rows of unequal length: what the function gives for padding does not reach the gradient
        def spoilt(params, tokens, mask):
            return params[tokens] + jnp.where(mask[..., None], 0, jnp.nan)

        short = found.mask.at[:2, 1:].set(False)
        scored = policies.from_apply(spoilt, vocab_size=VOCAB).log_prob(table, padded(PROMPTS), found.tokens, short)
        return scored.log_prob.sum()

    assert np.isfinite(jax.grad(total)(WEIGHTS)).all()


@pytest.mark.parametrize("with_cache", [False, True])
def test_the_laws(with_cache):
    own = {"prefill": prefill, "step": step} if with_cache else {}
    policy = policies.from_apply(decayed, vocab_size=VOCAB, eos_ids=EOS, **own)
    testing.check_policy(policy, WEIGHTS, padded(PROMPTS), max_new_tokens=3)


def test_greedy_tokens_are_those_of_a_loop():
    policy = policies.from_apply(decayed, vocab_size=VOCAB, prefill=prefill, step=step)
    found = decoding.sample(policy, WEIGHTS, jax.random.key(0), padded(PROMPTS), max_new_tokens=4, temperature=0.0)
    table = np.asarray(WEIGHTS)
    for row, prompt in enumerate(PROMPTS):
        state, tokens = np.zeros(VOCAB), []
        for token in prompt:
            state = state / 2 + table[token]
        for _ in range(4):
            tokens.append(int(state.argmax()))
            state = state / 2 + table[tokens[-1]]
        assert found.tokens[row].tolist() == tokens


def test_a_flax_module_and_its_gradients():
    nnx = pytest.importorskip("flax.nnx")

    class Bigram(nnx.Module):
        def __init__(self):
            self.table = nnx.Param(WEIGHTS)

        def __call__(self, tokens, mask):
            return self.table[...][tokens]

    (policy, params), (again, _) = (policies.from_nnx(Bigram(), vocab_size=VOCAB) for _ in range(2))
    assert again is policy
    tokens, mask = jnp.array([[1, 2], [3, 3], [0, 5], [6, 7], [9, 9]]), jnp.ones((5, 2), bool)

    def total(given):
        return decoding.log_prob(policy, given, jax.random.key(0), padded(PROMPTS), tokens, mask).log_prob.sum()

    lasts = [prompt[-1] for prompt in PROMPTS]
    table = jax.nn.log_softmax(WEIGHTS)
    expected = sum(table[last, row[0]] + table[row[0], row[1]] for last, row in zip(lasts, tokens, strict=True))
    np.testing.assert_allclose(total(params), expected, rtol=1e-5)
    (gradient,) = jax.tree.leaves(jax.grad(total)(params))
    assert float(jnp.abs(gradient[6, 1])) > 0


def test_an_equinox_module_and_its_gradients():
    equinox = pytest.importorskip("equinox")

    class Bigram(equinox.Module):
        table: jax.Array
        scale: float

        def __call__(self, tokens, mask):
            return self.scale * self.table[tokens]

    (policy, params), (again, _) = (policies.from_equinox(Bigram(WEIGHTS, 2.0), vocab_size=VOCAB) for _ in range(2))
    assert again is policy
    assert policies.from_equinox(Bigram(WEIGHTS, 3.0), vocab_size=VOCAB)[0] is not policy
    tokens, mask = jnp.array([[1, 2], [3, 3], [0, 5], [6, 7], [9, 9]]), jnp.ones((5, 2), bool)

    def total(given):
        return decoding.log_prob(policy, given, jax.random.key(0), padded(PROMPTS), tokens, mask).log_prob.sum()

    table, lasts = jax.nn.log_softmax(2 * WEIGHTS), [prompt[-1] for prompt in PROMPTS]
    expected = sum(table[last, row[0]] + table[row[0], row[1]] for last, row in zip(lasts, tokens, strict=True))
    np.testing.assert_allclose(total(params), expected, rtol=1e-5)
    assert float(jnp.abs(jax.grad(total)(params).table[6, 1])) > 0
    critic, own = critics.from_equinox(Bigram(WEIGHTS, 1.0), kind="increment")
    tilted = policies.tilt(policy, critic)
    found = tilted.init(policies.TiltParams(params, own, 1.0), jax.random.key(0), padded(PROMPTS), 2)[1]
    np.testing.assert_allclose(found.log_prob, jax.nn.log_softmax(3 * WEIGHTS)[jnp.array(lasts)], atol=1e-5)


def place_scores(params, tokens, mask):
    """A score of each next token that the whole text so far changes; padding has none."""
    return jnp.where(mask[..., None], decayed(params, tokens, mask) / 3, jnp.nan)


def text_scores(params, tokens, mask):
    """The score of a text: that of its last token among those of the text before it, increments summed."""
    each = jnp.where(mask, jnp.take_along_axis(params[tokens[:, 0]], tokens, axis=1), 0)
    return (each * jnp.arange(1, mask.shape[1] + 1)).sum(axis=1) / 10


@pytest.mark.parametrize(("f", "kind", "per"), [(place_scores, "increment", "token"), (text_scores, "level", "text")])
def test_the_laws_of_a_function_as_a_critic(f, kind, per):
    critic = critics.from_apply(f, kind=kind, per=per, vocab_size=VOCAB)
    testing.check_critic(critic, WEIGHTS, padded(PROMPTS), vocab_size=VOCAB, max_new_tokens=3)


def test_a_function_of_texts_is_the_reward_of_the_same_function():
    """A level critic of texts is its Reward at each prefix: for whole texts and for each candidate."""
    critic, reward = critics.from_apply(text_scores, kind="level", per="text"), rewards.from_apply(text_scores)
    tokens, prompts = jnp.array([[1, 2], [3, 3], [0, 5], [6, 7], [9, 9]]), padded(PROMPTS)
    policy = policies.tilt(policies.from_apply(decayed, vocab_size=VOCAB), critic)
    params = policies.TiltParams(WEIGHTS, WEIGHTS, 1.0)
    drawn = decoding.log_prob(policy, params, jax.random.key(0), prompts, tokens, jnp.ones((5, 2), bool))
    found = (drawn.log_prob - drawn.log_prob_ref + drawn.log_norm).sum(axis=1)
    text = decoding.join(prompts, drawn)
    np.testing.assert_allclose(found, reward(WEIGHTS, *text, jnp.arange(5)), atol=1e-4)
    few = jnp.broadcast_to(jnp.array([2, 7], jnp.int32), (5, 2))
    state = critic.init(WEIGHTS, jax.random.key(0), prompts, 2)
    output = policy.init(params, jax.random.key(0), prompts, 2)[1]
    every, some = (critic.score(WEIGHTS, jax.random.key(0), state, output, given)[0] for given in (None, few))
    np.testing.assert_allclose(every[:, [2, 7]], some, atol=1e-6)


def test_modules_as_rewards():
    nnx, equinox = pytest.importorskip("flax.nnx"), pytest.importorskip("equinox")

    class Flax(nnx.Module):
        def __init__(self):
            self.table = nnx.Param(WEIGHTS)

        def __call__(self, tokens, mask):
            return text_scores(self.table[...], tokens, mask)

    class Equinox(equinox.Module):
        table: jax.Array

        def __call__(self, tokens, mask):
            return text_scores(self.table, tokens, mask)

    text = jnp.array([[0, 1, 2], [3, 4, 5]]), jnp.array([[False, True, True], [True, True, False]])
    rest = jnp.array([1, 1]), jnp.array([0, 1])
    expected = text_scores(WEIGHTS, jnp.array([[1, 2, 0], [3, 4, 0]]), jnp.array([[1, 1, 0], [1, 1, 0]], bool))
    for reward, params in (rewards.from_nnx(Flax()), rewards.from_equinox(Equinox(WEIGHTS))):
        np.testing.assert_allclose(rewards.call_reward(reward, params, *text, *rest), expected, rtol=1e-6)
    critic, params = critics.from_nnx(Flax(), kind="level", per="text")
    assert critic is critics.from_nnx(Flax(), kind="level", per="text")[0]
    assert critic.init(params, jax.random.key(0), padded(PROMPTS), 2).text.tokens.shape == (5, 6)


def test_what_a_critic_or_reward_of_a_function_refuses():
    prompts, key = padded(PROMPTS), jax.random.key(0)
    for build, match in (
        (lambda: critics.from_apply(None, kind="level"), "score: expected a function, found None"),
        (lambda: critics.from_apply(decayed, kind="levels"), "kind: expected 'level' or 'increment', found 'levels'"),
        (lambda: critics.from_apply(decayed, kind="level", per="word"), "per: expected 'token' or 'text'"),
        (lambda: critics.from_apply(decayed, kind="level", vocab_size=0), "vocab_size: expected at least 1 token"),
        (lambda: rewards.from_apply(3), "score: expected a function, found 3"),
    ):
        with pytest.raises(ValueError, match=match):
            build()
    base = policies.from_apply(decayed, vocab_size=VOCAB)
    for f, per, match in (
        (text_scores, "token", r"score \(text_scores\): expected shape \(5, 6, 11\), a score per text, place"),
        (decayed, "text", r"score \(decayed\): expected shape \(55,\), a score per text, found"),
    ):
        tilted = policies.tilt(base, critics.from_apply(f, kind="level", per=per))
        with pytest.raises(ValueError, match=match):
            tilted.init(policies.TiltParams(WEIGHTS, WEIGHTS, 1.0), key, prompts, 2)
    with pytest.raises(ValueError, match=r"decayed: expected one real number per text, shape \(5,\)"):
        rewards.from_apply(decayed)(WEIGHTS, prompts.tokens, prompts.mask, jnp.ones(5, int), jnp.arange(5))


def test_what_is_refused():
    for build, match in (
        (lambda: policies.from_apply(None, vocab_size=3), "apply: expected a function, found None"),
        (lambda: policies.from_apply(decayed, vocab_size=3, step=step), "prefill, step: expected both.*step alone"),
        (lambda: policies.from_apply(decayed, vocab_size=0), "vocab_size: expected at least 1 token, found 0"),
        (
            lambda: policies.from_apply(decayed, vocab_size=3, prefill=prefill, step=step, hidden=True),
            "hidden: expected False beside prefill and step, found True",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            build()
    prompts = padded(PROMPTS)
    for policy, match in (
        (
            policies.from_apply(decayed, vocab_size=7),
            r"apply \(decayed\): expected shape \(5, 6, 7\)",
        ),
        (policies.from_apply(decayed, vocab_size=VOCAB, hidden=True), r"apply \(decayed\): expected a pair"),
        (
            policies.from_apply(decayed, vocab_size=7, prefill=prefill, step=step),
            r"\(prefill\): expected shape \(5, 7\)",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            policy.init(WEIGHTS, jax.random.key(0), prompts, 2)
    with pytest.raises(ValueError, match=r"prompts: expected token ids in \[0, 7\), found ids from 1 to 10"):
        policies.from_apply(decayed, vocab_size=7).check(WEIGHTS, prompts, 2)

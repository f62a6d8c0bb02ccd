"""Functions from tokens to logits as Policies: the laws, the numbers of the model itself, and refusals by name."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, testing
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


def test_a_torch_module_is_read_on_the_host(monkeypatch):
    """Through a stand-in for torch, which the library only imports inside: int64 and bool tensors, `logits` read."""

    class Tensor(np.ndarray):
        def float(self):
            return self.astype(np.float32)

        def numpy(self):
            return np.asarray(self)

    class NoGrad:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    fake = types.SimpleNamespace(from_numpy=lambda x: x.view(Tensor), no_grad=NoGrad)
    monkeypatch.setitem(sys.modules, "torch", fake)
    seen = []

    def module(tokens, mask):
        seen.append((tokens.dtype, mask.dtype))
        return types.SimpleNamespace(logits=np.asarray(WEIGHTS, np.float64)[np.asarray(tokens)].view(Tensor))

    policy, params = policies.from_torch(module, vocab_size=VOCAB, eos_ids=0)
    found = decoding.sample(policy, params, jax.random.key(0), padded(PROMPTS), max_new_tokens=3, temperature=0.0)
    table = np.asarray(WEIGHTS)
    for row, prompt in enumerate(PROMPTS):
        assert int(found.tokens[row, 0]) == table[prompt[-1]].argmax()
    assert set(seen) == {(np.dtype(np.int64), np.dtype(bool))}


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

"""Cached steps, candidate scoring and padding, in float32 and (identities) float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from tests.conftest import PROMPTS, VOCAB, alone, forward, needs_jit, padded, tiny_config, tiny_lm

KINDS = {
    "plain": {},
    "windows": {"windows": (3, None), "family": "qwen2", "qkv_bias": True},
    "qk_norm": {"family": "qwen3", "qk_norm": True, "tie_embeddings": True},
}
STEPS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 1, 2], [3, 3, 3, 3], [0, 1, 0, 1]])


def full_rows() -> list[list[int]]:
    return [prompt + STEPS[b].tolist() for b, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_equals_uncached(kind, side):
    lm, params = tiny_lm(0, **KINDS[kind])
    prompts = padded(PROMPTS, side=side, extra=2)
    prefill = jax.jit(lm.prefill, static_argnums=3)
    hidden, cache = prefill(params, prompts.tokens, prompts.mask, prompts.tokens.shape[1] + 4)
    step = jax.jit(lm.step)
    for t in range(5):
        for b, prompt in enumerate(PROMPTS):
            expected = alone(lm, params, prompt + STEPS[b, :t].tolist()).hidden[-1]
            np.testing.assert_allclose(hidden[b], expected, rtol=1e-5, atol=1e-5)
        if t < 4:
            hidden, cache = step(params, cache, STEPS[:, t])


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_equal_full_rescorings(kind):
    lm, params = tiny_lm(0, **KINDS[kind])
    prompts = padded(PROMPTS)
    _, cache = jax.jit(lm.prefill, static_argnums=3)(params, prompts.tokens, prompts.mask, 8)
    candidates = jnp.array([[1, 4, 0], [2, 2, 9], [10, 1, 5], [8, 7, 6], [3, 0, 2]])
    hidden, entries = jax.jit(lm.candidates)(params, cache, candidates)
    for b, prompt in enumerate(PROMPTS):
        for k in range(3):
            expected = alone(lm, params, [*prompt, int(candidates[b, k])]).hidden[-1]
            np.testing.assert_allclose(hidden[b, k], expected, rtol=1e-5, atol=1e-5)
    # The winner's entries make the cache that stepping to it makes.
    choice = jnp.array([2, 0, 1, 1, 0])
    committed = lm.commit(cache, entries, choice)
    _, stepped = lm.step(params, cache, candidates[jnp.arange(5), choice])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), committed, stepped)


def test_a_standing_row_writes_nowhere():
    lm, params = tiny_lm(0)
    prompts = padded(PROMPTS)
    _, cache = lm.prefill(params, prompts.tokens, prompts.mask, 6)
    _, moved = lm.step(params, cache, jnp.array([-1, 4, -1, 5, -1]))
    np.testing.assert_array_equal(moved.length - cache.length, [0, 1, 0, 1, 0])
    for old, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(moved.layers), strict=True):
        for b in (0, 2, 4):
            np.testing.assert_array_equal(old[b], new[b])
        assert not np.array_equal(old[1], new[1])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """All real positions of a row give the same values alone, left-padded and right-padded."""
    with jax.enable_x64(True):
        lm, params = tiny_lm(0, "value", dtype="float64", **KINDS[kind])
        rows = full_rows()
        for side in ("left", "right"):
            batch = padded(rows, side=side, extra=3)
            out = jax.tree.map(np.asarray, forward(lm, params, batch.tokens, batch.mask))
            for b, row in enumerate(rows):
                single = forward(lm, params, jnp.array([row])) if b == 0 else alone(lm, params, row)
                logits, head = (x[0] if b == 0 else x for x in (single.logits, single.head))
                real = np.asarray(batch.mask[b])
                np.testing.assert_allclose(out.logits[b][real], logits, rtol=1e-9, atol=1e-10)
                np.testing.assert_allclose(out.head[b][real], head, rtol=1e-9, atol=1e-10)


def test_gradients_are_finite_with_padding_and_an_empty_row():
    lm, params = tiny_lm(0, "reward")
    batch = padded([*PROMPTS, [1]])
    mask = batch.mask.at[-1].set(False)
    gradient = jax.jit(jax.grad(lambda p: lm.apply(p, batch.tokens, mask=mask).head.sum()))(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_runs_from_embeddings():
    lm, params = tiny_lm(0)
    tokens = jnp.array([[1, 2, 3, 4]])
    table = lm.embed(params, tokens)
    given = jax.jit(lambda e: lm.apply(params, tokens, embeddings=e).logits)
    np.testing.assert_array_equal(given(table), forward(lm, params, tokens).logits)
    gradient = jax.jit(jax.grad(lambda e: given(e)[0, -1, 0]))(table)
    assert gradient.shape == (1, 4, 16)
    assert float(jnp.abs(gradient[0, 0]).max()) > 0


def test_bfloat16_keeps_logits_and_heads_in_float32():
    lm, params = tiny_lm(0, "value", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    out = forward(lm, params, jnp.array([[1, 2, 3]]))
    assert (out.logits.dtype, out.head.dtype, out.hidden.dtype) == ("float32", "float32", "bfloat16")
    wide, exact = tiny_lm(0, "value")
    expected = forward(wide, jax.tree.map(lambda x: x.astype("float32"), params), jnp.array([[1, 2, 3]])).logits
    assert float(jnp.abs(out.logits - expected).max()) < 0.05 * float(jnp.abs(expected).max())
    del exact


def test_models_without_logits_or_head_say_so():
    lm, params = tiny_lm(0, "reward")
    assert lm.apply(params, jnp.array([[1]])).logits is None
    with pytest.raises(ValueError, match="logits"):
        lm.logits(params, jnp.zeros((1, 16)))
    lm, params = tiny_lm(0)
    with pytest.raises(ValueError, match="head"):
        lm.head(params, jnp.zeros((1, 16)))


def test_capacity_and_config_are_checked():
    lm, params = tiny_lm(0)
    with pytest.raises(ValueError, match="capacity"):
        lm.prefill(params, jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), bool), 3)
    with pytest.raises(ValueError, match="num_kv_heads"):
        tiny_config(num_kv_heads=3)
    with pytest.raises(ValueError, match="windows"):
        tiny_config(windows=(3,))
    with pytest.raises(ValueError, match="vocab_size"):
        tiny_config(vocab_size=0)


def test_equal_configurations_are_equal_models():
    left, right = models.LanguageModel(tiny_config()), models.LanguageModel(tiny_config())
    assert left == right
    assert hash(left) == hash(right)
    assert left != models.LanguageModel(tiny_config(), "bfloat16")


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunked_log_probabilities_equal_dense_ones_with_their_gradients(chunk):
    with jax.enable_x64(True):
        lm, params = tiny_lm(0, dtype="float64")
        hidden = jax.random.normal(jax.random.key(1), (2, 7, 16), jnp.float64)
        targets = jax.random.randint(jax.random.key(2), (2, 7), 0, VOCAB)

        def dense(params, hidden):
            log_prob = jax.nn.log_softmax(lm.logits(params, hidden))
            return jnp.take_along_axis(log_prob, targets[..., None], axis=-1)[..., 0]

        def chunked(params, hidden):
            return models.token_log_prob(lm, params, hidden, targets, chunk=chunk)

        np.testing.assert_allclose(chunked(params, hidden), dense(params, hidden), rtol=1e-12)
        weight = jnp.arange(14.0).reshape(2, 7)
        found = jax.grad(lambda p, h: (weight * chunked(p, h)).sum(), argnums=(0, 1))(params, hidden)
        expected = jax.grad(lambda p, h: (weight * dense(p, h)).sum(), argnums=(0, 1))(params, hidden)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


@needs_jit
def test_chunked_log_probabilities_never_keep_the_whole_logits():
    """The largest array in the compiled gradient is smaller than [B,L,V]: memory is bounded by the chunk."""
    lm, params = tiny_lm(0, vocab_size=512)
    hidden, targets = jnp.zeros((2, 256, 16)), jnp.zeros((2, 256), jnp.int32)

    def loss(params, hidden):
        return models.token_log_prob(lm, params, hidden, targets, chunk=16).sum()

    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 256 * 512 * 4 / 2

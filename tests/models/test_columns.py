"""Hidden states at chosen columns: the last layer runs there alone, to the numbers of the whole pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from tests.conftest import needs_jit, tiny_lm

CHANGES = {
    "llama": {},
    "grouped heads, window": {"num_heads": 4, "num_kv_heads": 2, "windows": (None, 3)},
    "biases, norms": {"qkv_bias": True, "mlp_bias": True, "out_bias": True, "qk_norm": True},
    "one layer": {"num_layers": 1},
}


def build(name: str, dtype: str = "float32") -> tuple[models.LanguageModel, dict]:
    lm, _ = tiny_lm(0, "reward", dtype, **CHANGES[name])
    # Biases start at zero, where a lost one would not be seen.
    params = lm.init(jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return lm, jax.tree.unflatten(tree, [x + n.astype(x.dtype) for x, n in zip(leaves, noise, strict=True)])


def rows(lm: models.LanguageModel) -> tuple[jax.Array, jax.Array]:
    """Three rows of 9: right-padded, left-padded, with a hole."""
    tokens = jax.random.randint(jax.random.key(3), (3, 9), 0, lm.vocab_size)
    mask = np.ones((3, 9), bool)
    mask[0, 6:], mask[1, :4], mask[2, 3:5] = False, False, False
    return tokens, jnp.asarray(mask)


def pick(hidden, at):
    return jnp.take_along_axis(hidden, at[..., None], axis=1)


@pytest.mark.parametrize("name", CHANGES)
def test_columns_are_those_of_the_whole_pass_with_their_gradients(name):
    lm, params = build(name)
    tokens, mask = rows(lm)
    at = jnp.array([[5, 0], [8, 4], [8, 2]])
    weight = jax.random.normal(jax.random.key(4), (3, 2, lm.config.hidden_size))

    def whole(params):
        return pick(lm.hidden(params, tokens, mask=mask), at)

    def columns(params):
        return lm.hidden(params, tokens, mask=mask, at=at)

    np.testing.assert_allclose(columns(params), whole(params), atol=2e-6)
    one, other = (jax.grad(lambda p, f=f: (f(p) * weight).sum())(params) for f in (columns, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, other)


@pytest.mark.parametrize("packed", [None, 12])
@pytest.mark.parametrize("name", ["llama", "grouped heads, window", "biases, norms"])
def test_columns_of_segments_are_those_of_the_whole_pass(name, packed):
    lm, params = build(name)
    tokens, mask = rows(lm)
    _, cache = lm.prefill(params, tokens, mask, 16)
    segments = jax.random.randint(jax.random.key(5), (3, 2, 4), 0, lm.vocab_size)
    lengths = jnp.array([[4, 1], [2, 0], [3, 2]])
    real = jnp.arange(4) < lengths[..., None]
    last = lengths - 1
    whole, entries = lm.segments(params, cache, segments, real, packed=packed)
    found, same = lm.segments(params, cache, segments, real, packed=packed, at=last)
    expected = jnp.take_along_axis(whole, jnp.maximum(last, 0)[..., None, None], axis=2)[:, :, 0]
    there = np.asarray(last >= 0)
    np.testing.assert_allclose(np.asarray(found)[there], np.asarray(expected)[there], atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), same, entries)


def test_in_bfloat16_columns_have_the_type_and_the_numbers_of_the_whole_pass():
    lm, params = build("biases, norms", "bfloat16")
    tokens, mask = rows(lm)
    at = jnp.array([[5], [8], [8]])
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)  # products still run in the model's own type
    for given in (params, wide):
        found, expected = lm.hidden(given, tokens, mask=mask, at=at), pick(lm.hidden(given, tokens, mask=mask), at)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.06)


def test_a_row_without_tokens_leaves_the_others_and_their_gradients_alone():
    lm, params = build("llama")
    tokens, mask = rows(lm)
    mask = mask.at[1].set(False)
    at = jnp.array([[5], [-1], [8]])

    def total(params, mask, at):
        return lm.hidden(params, tokens, mask=mask, at=at)[jnp.array([0, 2])].sum()

    found, slope = jax.value_and_grad(total)(params, mask, at)
    whole = pick(lm.hidden(params, tokens, mask=mask), jnp.maximum(at, 0))
    np.testing.assert_allclose(found, whole[jnp.array([0, 2])].sum(), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_an_empty_segment_takes_nothing_from_the_row_that_lends_it_a_place():
    """Not even by the gradient, where its own row is NaN."""
    lm, params = build("llama")
    tokens, mask = rows(lm)
    _, cache = lm.prefill(params, tokens, mask, 16)
    broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), cache.layers)
    segments = jax.random.randint(jax.random.key(5), (3, 1, 4), 0, lm.vocab_size)
    real = jnp.array([[[True] * 4], [[False] * 4], [[True] * 3 + [False]]])
    embeddings = lm.embed(params, segments)

    def total(embeddings, layers, **options):
        given = {"embeddings": embeddings, "packed": 8} | options
        hidden, _ = lm.segments(params, cache._replace(layers=layers), segments, real, **given)
        return hidden[jnp.array([0, 2])].sum()

    last = jnp.array([[3], [-1], [2]])
    for options in ({}, {"at": last}):
        slope = jax.grad(total)(embeddings, broken, **options)
        expected = jax.grad(total)(embeddings, cache.layers, **options)
        there = np.asarray(real)[..., None] & np.array([True, False, True])[:, None, None, None]
        np.testing.assert_allclose(np.where(there, slope, 0), np.where(there, expected, 0), atol=1e-5)


def test_the_gradient_of_segments_at_their_last_tokens():
    lm, params = build("grouped heads, window")
    tokens, mask = rows(lm)
    _, cache = lm.prefill(params, tokens, mask, 16)
    segments = jax.random.randint(jax.random.key(5), (3, 2, 4), 0, lm.vocab_size)
    real = jnp.ones((3, 2, 4), bool)
    last = jnp.full((3, 2), 3)

    def picked(params, **options):
        hidden, _ = lm.segments(params, cache, segments, real, **options)
        return (hidden if "at" in options else hidden[:, :, 3]) ** 2

    one, other = (jax.grad(lambda p, o=o: picked(p, **o).sum())(params) for o in ({"at": last}, {}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), one, other)


@needs_jit
def test_log_probabilities_of_a_large_batch_keep_the_logits_of_2048_tokens():
    lm, params = tiny_lm(0, vocab_size=8192)
    hidden = jax.random.normal(jax.random.key(1), (64, 65, 16))  # 65: chunks of 22, not two of 32 and one of a token
    targets = jax.random.randint(jax.random.key(2), (64, 65), 0, 8192)

    def loss(hidden, chunk=None):
        return models.token_log_prob(lm, params, hidden, targets, chunk=chunk).sum()

    memory = jax.jit(jax.grad(loss)).lower(hidden).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 65 * 8192 * 4
    np.testing.assert_allclose(jax.grad(loss)(hidden), jax.grad(lambda h: loss(h, 65))(hidden), atol=1e-5)
    # A chunk just above half the length is two of one size.
    sizes = []
    record = lambda x: sizes.append(x.shape[1]) or x  # noqa: E731
    models.chunked(record, jnp.zeros((2, 10, 1)), chunk=7)
    # Up to 2^24 numbers are kept: one chunk. Of another size, or not known, they are not.
    for width in (8192, 8193, None):
        models.chunked(record, jnp.zeros((8, 256, 1)), width=width)
    assert sizes == [5, 256, 64, 64]


def test_an_adapter_reaches_the_columns():
    lm, params = build("grouped heads, window")
    tokens, mask = rows(lm)
    spec = models.Lora(rank=2)
    adapter = models.lora.init(jax.random.key(6), lm, spec)
    adapter = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(7), x.shape), adapter)
    with_adapter = models.lora.attach(params, adapter, spec)
    at = jnp.array([[5], [8], [8]])
    found = lm.hidden(with_adapter, tokens, mask=mask, at=at)
    np.testing.assert_allclose(found, pick(lm.hidden(with_adapter, tokens, mask=mask), at), atol=2e-6)
    assert np.abs(np.asarray(found) - np.asarray(lm.hidden(params, tokens, mask=mask, at=at))).max() > 1e-2


@needs_jit
def test_a_reward_pays_for_the_last_layer_at_one_column_alone():
    """Floating-point operations of a one-layer model, as the compiler counts them: keys and values remain."""
    lm, params = build("one layer")
    tokens = jnp.zeros((4, 64), jnp.int32)
    at = jnp.full((4, 1), 63)

    def flops(**options):
        run = jax.jit(lambda params: lm.hidden(params, tokens, **options))
        return run.lower(params).compile().cost_analysis()["flops"]

    assert flops(at=at) < 0.3 * flops()

"""Segments of several tokens over a cache: one pass over the shared prefix equals a full forward pass of each text."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from tests.conftest import needs_jit, padded, tiny_config, tiny_lm
from tests.models import families, make_golden

PREFIXES = [[7, 8, 9, 10, 11], [20, 21], [30, 2, 31]]
M, S, LONGEST = 2, 5, 5 + 2 * 5
TOKENS = jax.random.randint(jax.random.key(0), (len(PREFIXES), M, S), 0, 60)
COUNTS = np.array([[5, 2], [0, 4], [1, 3]])
MASK = jnp.arange(S) < COUNTS[..., None]
CHOICE = jnp.array([1, 1, -1])
LEFT_OUT = {f"{name}_reward" for name in families.FURTHER}


@functools.partial(jax.jit, static_argnums=(0, 5))
def twice(lm, params, prefixes, tokens, mask, packed):
    """Segments after the prefixes, one of each row appended, and segments after that; for the first ones also the
    gradient of a sum of the hidden states in the embedding of the first token."""
    _, cache = lm.prefill(params, prefixes.tokens, prefixes.mask, prefixes.tokens.shape[1] + S)
    embeddings = lm.embed(params, tokens)

    def total(e):
        given = embeddings.at[:, :, 0].set(e)
        hidden, entries = lm.segments(params, cache, tokens, mask, embeddings=given, packed=packed)
        return weigh(jnp.where(mask[..., None], hidden, 0)).sum(), (hidden, entries)

    gradient, (hidden, entries) = jax.grad(total, has_aux=True)(embeddings[:, :, 0])
    cache = lm.append(cache, entries, mask, CHOICE)
    return hidden, gradient, lm.segments(params, cache, tokens, mask, packed=packed)[0], cache.length


def prefill(lm, params, prefixes, capacity):
    return jax.jit(lm.prefill, static_argnums=3)(params, prefixes.tokens, prefixes.mask, capacity)


def weigh(hidden):
    """A number for each of [...,L,D] that differs in its derivatives."""
    return (hidden * jnp.sin(jnp.arange(hidden.shape[-1]) + 1.0)).sum(axis=(-2, -1))


@functools.partial(jax.jit, static_argnums=0)
def alone(lm, params, tokens, length, begin):
    """(hidden [L,D] of one text, gradient of the same sum over its tokens from `begin` in the embedding there)."""
    real = jnp.arange(tokens.shape[0]) < length
    embeddings = lm.embed(params, tokens)

    def total(e):
        given = embeddings.at[begin].set(e)
        hidden = lm.hidden(params, tokens[None], mask=real[None], embeddings=given[None])[0]
        inside = real & (jnp.arange(tokens.shape[0]) >= begin)
        return weigh(jnp.where(inside[:, None], hidden, 0)), hidden

    gradient, hidden = jax.grad(total, has_aux=True)(embeddings[begin])
    return hidden, gradient


def expected(lm, params, prefix: list[int], segment: list[int]):
    text = jnp.asarray((prefix + segment + [0] * LONGEST)[:LONGEST])
    hidden, gradient = alone(lm, params, text, len(prefix) + len(segment), len(prefix))
    return hidden[len(prefix) : len(prefix) + len(segment)], gradient


def assert_close(found, wanted, scale=1.0):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", [name for name in families.CHECKPOINTS if name not in LEFT_OUT])
def test_segments_over_a_cache_equal_the_full_forward_pass(name):
    """Every family, sliding windows among them; rows and segments of different lengths, an empty one too; every other
    family packed; after an append; with gradients in the embedding of the first token."""
    lm, params = models.load(make_golden.GOLDEN / name)
    if name in families.STRETCHED:  # a cache that passes the original context keeps the frequencies of before
        rope = dataclasses.replace(lm.config.rope, original_max_length=64)
        lm = models.LanguageModel(dataclasses.replace(lm.config, rope=rope))
    prefixes = padded(PREFIXES)
    packed = int(COUNTS.sum()) if list(families.CHECKPOINTS).index(name) % 2 else None
    first, gradient, second, length = twice(lm, params, prefixes, TOKENS, MASK, packed)
    for b, prefix in enumerate(PREFIXES):
        chosen = int(CHOICE[b])
        appended = [] if chosen < 0 else TOKENS[b, chosen, : COUNTS[b, chosen]].tolist()
        assert int(length[b]) == len(prefix) + len(appended)
        for m in range(M):
            count = int(COUNTS[b, m])
            segment = TOKENS[b, m, :count].tolist()
            hidden, slope = expected(lm, params, prefix, segment)
            scale = float(jnp.abs(hidden).max(initial=1.0))
            assert_close(first[b, m, :count], hidden, scale)
            assert_close(second[b, m, :count], expected(lm, params, prefix + appended, segment)[0], scale)
            if count:
                assert_close(gradient[b, m], slope, float(jnp.abs(slope).max()))
                assert float(jnp.abs(slope).max()) > 1e-3


def test_segments_of_one_token_are_candidates_and_appends_are_steps():
    lm, params = tiny_lm(0, windows=(3, None), family="qwen2", qkv_bias=True)
    prefixes = padded([[4, 5, 6], [7], [8, 9]])
    _, cache = prefill(lm, params, prefixes, 6)
    tokens = jnp.array([[1, 4, 0], [2, 2, 9], [10, 1, 5]])
    one = jnp.ones((3, 3, 1), bool)
    hidden, entries = jax.jit(lm.segments)(params, cache, tokens[..., None], one)
    wanted, _ = jax.jit(lm.candidates)(params, cache, tokens)
    assert_close(hidden[:, :, 0], wanted)
    found = lm.append(cache, entries, one, jnp.array([2, -1, 0]))
    _, stepped = jax.jit(lm.step)(params, cache, jnp.array([0, -1, 10]))
    jax.tree.map(assert_close, found, stepped)


@pytest.mark.parametrize("packed", [None, 4])
def test_nan_stays_in_its_row_and_a_full_cache_is_nan(packed):
    """Packed rows are neighbours: what one of them holds must not reach the others, forward or back. What is given
    where there is no token reaches nothing."""
    lm, params = tiny_lm(0, num_layers=1)
    prefixes = padded([[4, 5, 6], [7], [8, 9]])
    _, cache = prefill(lm, params, prefixes, 4)
    tokens, mask = jnp.ones((3, 1, 2), jnp.int32), jnp.array([[[True, False]], [[True, True]], [[True, False]]])
    given = lm.embed(params, tokens).at[1].set(jnp.nan)

    def total(e, cache):
        hidden, entries = lm.segments(params, cache, tokens, mask, embeddings=e, packed=packed)
        return jnp.where(mask[..., None], hidden, 0)[jnp.array([0, 2])].sum(), (hidden, entries)

    forward_and_back = jax.jit(jax.grad(total, has_aux=True))
    gradient, (hidden, entries) = forward_and_back(given, cache)
    assert np.isnan(hidden[1]).all()
    assert np.isfinite(hidden[jnp.array([0, 2]), :, 0]).all()
    assert np.isfinite(gradient[jnp.array([0, 2]), :, 0]).all()
    wanted = hidden[jnp.array([0, 2]), :, 0]
    hidden = forward_and_back(jnp.where(mask[..., None], given, jnp.nan), cache)[1][0]
    np.testing.assert_array_equal(hidden[jnp.array([0, 2]), :, 0], wanted)
    full = cache._replace(length=jnp.array([4, 3, 4]))
    full = lm.append(full, entries, mask, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(full.length, [5, 5, 5])
    assert np.isnan(forward_and_back(given, full)[1][0]).all()


@needs_jit
def test_segments_read_the_shared_cache_without_a_copy_for_each():
    """The temporaries of many segments stay far below a cache for each of them."""
    lm = models.LanguageModel(tiny_config(max_length=1024, head_dim=16))
    params = lm.init(jax.random.key(0))
    _, cache = lm.prefill(params, jnp.ones((2, 2), jnp.int32), jnp.ones((2, 2), bool), 1024)
    tokens, mask = jnp.ones((2, 24, 2), jnp.int32), jnp.ones((2, 24, 2), bool)
    program = jax.jit(lm.segments).lower(params, cache, tokens, mask).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert program.memory_analysis().temp_size_in_bytes < 24 * size / 4

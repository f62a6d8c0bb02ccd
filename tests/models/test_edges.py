"""Edges of the model: rows that stand still, ids outside the vocabulary, empty rows, heads, half precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from tests.conftest import PROMPTS, VOCAB, forward, padded, tiny_config, tiny_lm


def test_a_choice_of_minus_one_writes_nowhere():
    """Also in a full cache, where the next slot would lie past the end."""
    lm, params = tiny_lm(0)
    prompts = padded(PROMPTS)
    _, cache = jax.jit(lm.prefill, static_argnums=3)(params, prompts.tokens, prompts.mask, 4)
    assert int(cache.length.max()) == 4
    _, entries = jax.jit(lm.candidates)(params, cache, jnp.ones((5, 3), jnp.int32))
    same = jax.jit(lm.commit)(cache, entries, jnp.full(5, -1))
    jax.tree.map(np.testing.assert_array_equal, same, cache)
    moved = jax.jit(lm.commit)(cache, entries, jnp.array([2, -1, 0, -1, -1]))
    np.testing.assert_array_equal(moved.length - cache.length, [1, 0, 1, 0, 0])
    for old, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(moved.layers), strict=True):
        changed = (old != new).any(axis=(1, 3))  # [B,S]
        expected = np.zeros((5, 4), bool)
        expected[0, 3] = expected[2, 2] = True
        np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_outside_the_vocabulary_change_nothing(side):
    """A pad id is often one past the last row of the embedding; -1 and large ids are seen too."""
    lm, params = tiny_lm(0, "value")
    batch = padded(PROMPTS, side=side)
    expected = jax.tree.map(np.asarray, forward(lm, params, batch.tokens, batch.mask))
    real = np.asarray(batch.mask)
    loss = jax.jit(jax.grad(lambda p, t: jnp.where(batch.mask, lm.apply(p, t, mask=batch.mask).head[..., 0], 0).sum()))
    gradient = loss(params, batch.tokens)
    for pad in (VOCAB, 10**6, -1):
        tokens = jnp.where(batch.mask, batch.tokens, pad)
        found = jax.tree.map(np.asarray, forward(lm, params, tokens, batch.mask))
        np.testing.assert_allclose(found.logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), loss(params, tokens), gradient
        )


def test_an_empty_row_is_finite_and_changes_no_other():
    lm, params = tiny_lm(0)
    batch = padded(PROMPTS)
    empty = batch.mask.at[1].set(False)
    found = forward(lm, params, batch.tokens, empty).logits
    assert bool(jnp.isfinite(found).all())
    np.testing.assert_array_equal(found[0], forward(lm, params, batch.tokens, batch.mask).logits[0])


def test_a_mask_of_another_shape_is_refused():
    lm, params = tiny_lm(0)
    with pytest.raises(ValueError, match="mask"):
        lm.hidden(params, jnp.ones((2, 3), jnp.int32), mask=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match="chunk"):
        models.token_log_prob(lm, params, jnp.zeros((1, 2, 16)), jnp.zeros((1, 2), jnp.int32), chunk=0)


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "tanh"])
def test_a_value_head_is_the_mlp_it_says(activation):
    spec = models.Head("value", hidden_size=6, num_hidden=2, activation=activation)
    lm = models.with_head(tiny_lm(0)[0], spec)
    head = jax.tree.map(lambda x: x + 0.1, lm.init_head(jax.random.key(3)))
    hidden = jax.random.normal(jax.random.key(1), (2, 3, 16))
    function = jnp.tanh if activation == "tanh" else getattr(jax.nn, activation)
    inner = function(hidden @ head["inner"]["kernel"] + head["inner"]["bias"])
    inner = function(inner @ head["inner_1"]["kernel"] + head["inner_1"]["bias"])
    expected = inner @ head["outer"]["kernel"] + head["outer"]["bias"]
    found = lm.head({"head": head}, hidden)
    assert found.shape == (2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "width"),
    [
        (models.Head("reward", num_labels=3), 3),
        (models.Head("value"), 1),
        (models.Head("q"), VOCAB),
        (models.Head("q", hidden_size=5), VOCAB),
    ],
)
def test_a_head_joins_the_body_of_another_model(spec, width):
    body, params = tiny_lm(0)
    lm = models.with_head(body, spec)
    assert models.with_head(lm, None) == body
    joined = {"transformer": params["transformer"], "head": lm.init_head(jax.random.key(1))}
    out = forward(lm, joined, jnp.array([[1, 2, 3]]))
    assert out.head.shape == (1, 3, width) == (1, 3, lm.head_width)
    np.testing.assert_array_equal(out.hidden, forward(body, params, jnp.array([[1, 2, 3]])).hidden)


def test_bfloat16_decodes_as_it_scores():
    """Cached and uncached agree to bfloat16's rounding, and cached steps keep its dtype."""
    lm, params = tiny_lm(0, dtype="bfloat16")
    prompts = padded(PROMPTS)
    _, cache = jax.jit(lm.prefill, static_argnums=3)(params, prompts.tokens, prompts.mask, 5)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}
    hidden, _ = jax.jit(lm.step)(params, cache, jnp.full(5, 2))
    many, _ = jax.jit(lm.candidates)(params, cache, jnp.full((5, 2), 2))
    assert hidden.dtype == many.dtype == jnp.bfloat16
    assert lm.logits(params, hidden).dtype == jnp.float32
    batch = padded([[*prompt, 2] for prompt in PROMPTS])
    expected = jax.jit(lm.hidden)(params, batch.tokens, mask=batch.mask)[:, -1].astype(jnp.float32)
    for found in (hidden, many[:, 0], many[:, 1]):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.05, atol=0.05)
    gradient = jax.jit(jax.grad(lambda p: lm.apply(p, batch.tokens, mask=batch.mask).logits.sum()))(params)
    assert all(g.dtype == jnp.bfloat16 and bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_steps_are_differentiable():
    """Through prefill, step and candidates, with padding: equal to the gradient of the uncached pass."""
    lm, params = tiny_lm(0, num_layers=1, rope=models.Rope(100.0, "linear", 2.0))
    prompts = padded(PROMPTS[:2])

    def cached(params):
        _, cache = lm.prefill(params, prompts.tokens, prompts.mask, 4)
        hidden, cache = lm.step(params, cache, jnp.array([1, -1]))
        _, cache = lm.step(params, cache, jnp.array([-1, 3]))
        many, _ = lm.candidates(params, cache, jnp.array([[4], [5]]))
        return (hidden[0] ** 2).sum() + (many[:, 0] ** 2).sum()

    def uncached(params):
        batch = padded([[*PROMPTS[0], 1, 4], [*PROMPTS[1], 3, 5]])
        hidden = lm.hidden(params, batch.tokens, mask=batch.mask)
        return (hidden[0, -2] ** 2).sum() + (hidden[:, -1] ** 2).sum()

    found, expected = jax.jit(jax.grad(cached))(params), jax.jit(jax.grad(uncached))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_chunks_carry_any_statistics_of_any_arrays():
    """Two models' hidden states in, a dict out: exact KL and entropy per position."""
    lm, params = tiny_lm(0)
    other = tiny_lm(1)[1]
    tokens = jnp.arange(14).reshape(2, 7) % VOCAB
    left, right = (forward(lm, p, tokens).hidden for p in (params, other))

    def statistics(left, right):
        p, q = jax.nn.log_softmax(lm.logits(params, left)), jax.nn.log_softmax(lm.logits(other, right))
        return {"kl": (jnp.exp(p) * (p - q)).sum(-1), "entropy": -(jnp.exp(p) * p).sum(-1)}

    expected = statistics(left, right)
    found = models.chunked(statistics, left, right, chunk=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    assert found["kl"].shape == (2, 7)


def test_a_context_of_one_layer_and_one_token():
    lm = models.LanguageModel(tiny_config(num_layers=1, num_kv_heads=1, max_length=2))
    params = lm.init(jax.random.key(0))
    hidden, cache = jax.jit(lm.prefill, static_argnums=3)(params, jnp.array([[3]]), jnp.array([[True]]), 2)
    found, _ = jax.jit(lm.step)(params, cache, jnp.array([4]))
    expected = forward(lm, params, jnp.array([[3, 4]])).hidden
    np.testing.assert_allclose(jnp.stack([hidden, found], axis=1), expected, rtol=1e-5, atol=1e-5)

"""Hidden states at chosen columns: the last layer runs there alone, to the numbers of the whole pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from tests.conftest import tiny_lm

CHANGES = {
    "llama": {},
    "grouped heads, window": {"num_heads": 4, "num_kv_heads": 2, "windows": (None, 3)},
    "biases, norms": {"qkv_bias": True, "mlp_bias": True, "out_bias": True, "qk_norm": True},
    "one layer": {"num_layers": 1},
}


def build(name: str) -> tuple[models.LanguageModel, dict]:
    lm, _ = tiny_lm(0, "reward", **CHANGES[name])
    # Biases start at zero, where a lost one would not be seen.
    params = lm.init(jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return lm, jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


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


def test_an_adapter_reaches_the_columns():
    lm, params = build("grouped heads, window")
    tokens, mask = rows(lm)
    spec = models.Lora(rank=2)
    adapter = jax.tree.map(lambda x: x + 0.2, models.lora.init(jax.random.key(6), lm, spec))
    with_adapter = models.lora.attach(params, adapter, spec)
    at = jnp.array([[5], [8], [8]])
    found = lm.hidden(with_adapter, tokens, mask=mask, at=at)
    np.testing.assert_allclose(found, pick(lm.hidden(with_adapter, tokens, mask=mask), at), atol=2e-6)
    assert np.abs(np.asarray(found) - np.asarray(lm.hidden(params, tokens, mask=mask, at=at))).max() > 1e-2


def test_a_reward_pays_for_the_last_layer_at_one_column_alone():
    """Floating-point operations of a one-layer model, as the compiler counts them: keys and values remain."""
    lm, params = build("one layer")
    tokens = jnp.zeros((4, 64), jnp.int32)
    at = jnp.full((4, 1), 63)

    def flops(**options):
        run = jax.jit(lambda params: lm.hidden(params, tokens, **options))
        return run.lower(params).compile().cost_analysis()["flops"]

    assert flops(at=at) < 0.3 * flops()

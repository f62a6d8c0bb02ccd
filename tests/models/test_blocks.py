"""What makes a training step fast changes none of its numbers: queries in groups, cosines from a table, and products
of two matrices."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import rewards
from jaxalign.models import rotary, row_attention
from jaxalign.models.block import Rope
from tests.conftest import needs_jit, tiny_lm

LENGTH = 200
CHANGES = {
    "llama": {},
    "grouped heads, window": {"num_heads": 4, "num_kv_heads": 2, "windows": (None, 70)},
    "norms": {"qk_norm": True, "num_layers": 1},
}


def rows(lm) -> tuple[jax.Array, jax.Array]:
    """Five rows of 200: whole, right-padded, left-padded, with a hole, and one that is real in its last column alone,
    so that whole groups of queries have nothing to read."""
    mask = np.ones((5, LENGTH), bool)
    mask[1, 150:], mask[2, :90], mask[3, 40:140], mask[4, :-1] = False, False, False, False
    return jax.random.randint(jax.random.key(3), mask.shape, 0, lm.vocab_size), jnp.asarray(mask)


@pytest.mark.parametrize("length", [1, 9, 127, 128, 129, 193, 200, 255, 256, 257, 1000])
def test_every_query_is_in_one_group_that_reads_all_keys_up_to_it(length):
    found = row_attention.blocks(length)
    assert [i for start, stop, _ in found for i in range(start, stop)] == list(range(length))
    assert all(keys == stop for _, stop, keys in found)
    assert len(found) <= 4
    if length >= 128:
        assert min(stop - start for start, stop, _ in found) >= 16
        assert sum((stop - start) * keys for start, stop, keys in found) < 0.76 * length**2


@pytest.mark.parametrize("name", CHANGES)
def test_groups_of_queries_read_what_one_group_does(name, monkeypatch):
    lm, params = tiny_lm(0, max_length=256, **CHANGES[name])
    tokens, mask = rows(lm)
    weight = jax.random.normal(jax.random.key(4), (*tokens.shape, lm.config.hidden_size)) * mask[..., None]

    def read(params):
        found = lm.hidden(params, tokens, mask=mask)
        return (found * weight).sum(), found

    def both():
        (_, hidden), gradient = jax.jit(jax.value_and_grad(read, has_aux=True))(params)
        return jnp.where(mask[..., None], hidden, 0), gradient

    grouped = both()
    monkeypatch.setattr(row_attention, "blocks", lambda length, short=True: [(0, length, length)])
    jax.clear_caches()
    for a, b in zip(jax.tree.leaves(grouped), jax.tree.leaves(both()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


def test_groups_and_the_table_have_forward_derivatives():
    """The derivative along a direction is the gradient's part along it; an HVP is forward over reverse."""
    lm, params = tiny_lm(0, num_layers=1, max_length=256)
    tokens, mask = rows(lm)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(7), x.shape) * 1e-2, params)

    def total(params):
        return jnp.where(mask[..., None], jnp.sin(lm.hidden(params, tokens, mask=mask)), 0).sum()

    slope = jax.jit(lambda p: jax.jvp(total, (p,), (direction,))[1])(params)
    parts = jax.tree.map(lambda g, d: (g * d).sum(), jax.jit(jax.grad(total))(params), direction)
    assert float(slope) == pytest.approx(float(sum(jax.tree.leaves(parts))), rel=1e-3)
    curved = jax.jit(lambda p: jax.jvp(jax.grad(total), (p,), (direction,))[1])(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(curved))


def test_an_empty_axis_stays_empty():
    lm, params = tiny_lm(0)
    assert lm.logits(params, jnp.zeros((2, 0, lm.config.hidden_size))).shape == (2, 0, lm.vocab_size)
    reward = rewards.log_likelihood(lm)
    one = jnp.ones((2, 1), jnp.int32)
    np.testing.assert_array_equal(reward(params, one, one > 0, jnp.ones(2, jnp.int32), jnp.arange(2)), 0)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_a_table_of_cosines_rotates_to_the_same_bits(kind):
    rope = Rope(kind=kind, factor=4.0, original_max_length=64)
    x = jax.random.normal(jax.random.key(0), (3, 40, 2, 16))
    position = jax.random.randint(jax.random.key(1), (3, 40), 0, 40)
    plain, looked_up = rotary.rotate(x, position, rope), rotary.rotate(x, position, rope, limit=40)
    np.testing.assert_array_equal(plain, looked_up)
    assert np.abs(np.asarray(plain - x)).max() > 0.1


@needs_jit
def test_the_gradient_of_a_weight_is_a_product_of_two_matrices():
    """None of the products by weights has operands of three axes: the compiler would transpose them first."""
    lm, params = tiny_lm(0, num_layers=1)
    tokens = jnp.ones((2, 6), jnp.int32)

    def total(params):
        return jax.nn.logsumexp(lm.logits(params, lm.hidden(params, tokens, mask=tokens > 0))).sum()

    program = jax.jit(jax.grad(total)).lower(params).as_text()
    products = re.findall(r"stablehlo\.dot_general (.*)", program)
    plain = [line for line in products if "batching_dims" not in line]
    # Four projections and the logits, forward and by both operands; the rest are the attention's, batched.
    assert len(plain) == 15
    for line in plain:
        assert re.search(r": \(tensor<\d+x\d+xf32>, tensor<\d+x\d+xf32>\)", line), line

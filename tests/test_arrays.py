"""The largest of a row without putting it together: those of jax.lax.top_k, in blocks that devices do not share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import _arrays

NUMBERS = jax.random.normal(jax.random.key(0), (5, 4001))


@pytest.mark.parametrize("vocab", [1024, 1336, 4001])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_the_largest_are_those_of_top_k_with_equal_ones_in_their_order(vocab, k):
    """Three rows of many equal numbers, one of which has less than k finite ones, and one that ends in the largest."""
    x = jnp.round(NUMBERS[:, :vocab] * 3).at[1].set(-jnp.inf).at[1, 700:702].set(0.0)
    x = x.at[2, ::7].set(_arrays.NEGATIVE).at[3, -1].set(9.0).at[4].set(NUMBERS[4, :vocab])
    for found, expected in zip(_arrays.largest(x, k), jax.lax.top_k(x, k), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    folded = _arrays.largest(x[:4].reshape(2, 2, vocab), k)[1]
    np.testing.assert_array_equal(folded.reshape(4, k), jax.lax.top_k(x[:4], k)[1])


@pytest.mark.parametrize("vocab", [1336, 32000, 32064, 49152, 50304, 100352, 128256, 151936, 256000, 262208])
def test_no_block_lies_on_two_of_eight_devices(vocab):
    width = _arrays.block_width(vocab)
    assert vocab % (8 * width) == 0
    assert 16 <= width < 1024


@pytest.mark.parametrize("vocab", [11, 1000, 1024, 50257])
def test_other_vocabularies_have_the_usual_blocks(vocab):
    assert _arrays.block_width(vocab) == min(vocab, 128)


@pytest.mark.parametrize("vocab", [11, 1000, 1336, 32000, 32064, 49152, 50257, 50304, 100352, 128256, 256000, 262208])
def test_blocks_of_draws_are_those_of_the_largest(vocab):
    assert _arrays.draw_width(vocab) == _arrays.block_width(vocab)


def test_a_vocabulary_whose_blocks_would_be_small_has_larger_ones_of_draws():
    """Draws of Qwen's vocabulary: no block lies on two devices, and blocks and entries of one are few together."""
    width = _arrays.draw_width(151936)
    assert 151936 % (8 * width) == 0
    assert width + 151936 // width < 2048

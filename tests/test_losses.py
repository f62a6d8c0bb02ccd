"""Objectives: literal numbers, masked equals unmasked subset, finite gradients, minimisers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

MASK = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
VALUE = jnp.array([[0.5, 1.0, 9.0, 9.0], [0.1, 0.2, 0.3, 0.4], [-1.0, 9.0, 9.0, 9.0]])
REWARD = jnp.array([1.0, 0.0, 2.0])
UTILITY, THRESHOLD = jnp.array([1.0, 0.0, 2.0]), jnp.array([0.5, 0.5, 0.5])

SEQUENCE_LOSSES = {
    "language_model": lambda value, mask: losses.language_model(value, mask=mask),
    "fudge": lambda value, mask: losses.fudge(value, reward=REWARD, mask=mask),
    "td": lambda value, mask: losses.td(value, reward=REWARD, mask=mask),
    "cd_q": lambda value, mask: losses.cd_q(value, expected=value * 0.5, reward=REWARD, mask=mask),
    "soft_value": lambda value, mask: losses.soft_value(value, reward=REWARD, mask=mask, beta=0.7),
    "exceedance": lambda value, mask: losses.exceedance(value, utility=UTILITY, threshold=THRESHOLD, mask=mask),
}
PAIRS = {
    "chosen_log_prob": jnp.array([-1.0]),
    "rejected_log_prob": jnp.array([-2.0]),
    "chosen_log_prob_ref": jnp.array([-1.5]),
    "rejected_log_prob_ref": jnp.array([-1.0]),
}


def test_literal_numbers():
    np.testing.assert_allclose(
        losses.language_model(-VALUE, mask=MASK), (0.5 + 1 + 0.1 + 0.2 + 0.3 + 0.4 - 1) / 7, rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.bradley_terry(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])),
        (np.log(1 + np.exp(-1)) + np.log(1 + np.exp(2))) / 2,
        rtol=1e-6,
    )
    # Rows: ½(0.25 + 0), ½(0.01 + 0.04 + 0.09 + 0.16), ½·9.
    np.testing.assert_allclose(losses.fudge(VALUE, reward=REWARD, mask=MASK), (0.125 + 0.15 + 4.5) / 3, rtol=1e-6)
    # td: row 0 (0.5 − 1)²+(1 − 1)²; row 1 3·0.1² + 0.4²; row 2 (−1 − 2)².
    np.testing.assert_allclose(
        losses.td(VALUE, reward=REWARD, mask=MASK), (0.125 + 0.5 * (0.03 + 0.16) + 4.5) / 3, rtol=1e-6
    )
    q, log_ref = jnp.array([1.0, 5.0, jnp.nan]), jnp.log(jnp.array([0.25, 0.75, 0.0]))
    np.testing.assert_allclose(losses.expected_next(q, log_prob_ref=log_ref), 4.0, rtol=1e-6)
    np.testing.assert_allclose(losses.dpo(**PAIRS, beta=0.5), np.log(1 + np.exp(-0.75)), rtol=1e-6)
    np.testing.assert_allclose(losses.ipo(**PAIRS, beta=0.5), (1.5 - 1) ** 2, rtol=1e-6)


def test_label_smoothing_mixes_both_labels():
    pairs = list(PAIRS.values())
    right, wrong = (
        losses.dpo(**PAIRS, beta=0.5),
        losses.dpo(pairs[1], pairs[0], chosen_log_prob_ref=pairs[3], rejected_log_prob_ref=pairs[2], beta=0.5),
    )
    np.testing.assert_allclose(losses.dpo(**PAIRS, beta=0.5, label_smoothing=0.2), 0.8 * right + 0.2 * wrong, rtol=1e-6)


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_masked_entries_may_be_nan_and_change_nothing(name):
    loss = SEQUENCE_LOSSES[name]
    expected, gradient = jax.value_and_grad(loss)(VALUE, MASK)
    poisoned = jnp.where(MASK, VALUE, jnp.nan)
    found, poisoned_gradient = jax.value_and_grad(loss)(poisoned, MASK)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(poisoned_gradient, gradient, rtol=1e-6)
    assert (np.asarray(gradient)[~np.asarray(MASK)] == 0).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_bfloat16_inputs_give_float32_losses(name):
    assert SEQUENCE_LOSSES[name](VALUE.astype("bfloat16"), MASK).dtype == "float32"


def test_accumulated_language_model_loss_is_the_large_batch():
    whole = losses.language_model(-VALUE, mask=MASK)
    parts = sum(losses.language_model(-VALUE[b : b + 1], mask=MASK[b : b + 1], count=MASK.sum()) for b in range(3))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_the_linex_minimiser_is_the_soft_value():
    with jax.enable_x64(True):
        rewards, beta = jnp.array([0.1, -1.0, 2.0, 0.5]), 0.6
        target = beta * (jax.nn.logsumexp(rewards / beta) - jnp.log(4.0))
        mask = jnp.ones((4, 1), bool)

        def loss(v):
            return losses.soft_value(jnp.full((4, 1), v), reward=rewards, mask=mask, beta=beta)

        np.testing.assert_allclose(jax.grad(loss)(target), 0, atol=1e-12)
        assert loss(target) < min(loss(target - 0.01), loss(target + 0.01))


def test_the_linex_tail_is_finite_convex_and_still_pulls_up():
    mask = jnp.ones((1, 1), bool)

    def loss(v):
        return losses.soft_value(jnp.array([[v]]), reward=jnp.array([1e4]), mask=mask, beta=1.0)

    assert np.isfinite(loss(0.0))
    assert jax.grad(loss)(0.0) < 0
    assert loss(10.0) < loss(0.0)


def test_the_clipped_share_counts_tokens_beyond_the_largest_exponent():
    value = jnp.array([[0.0, 0.0, 0.0], [-30.0, 0.0, jnp.nan], [0.0, 0.0, 0.0]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
    share = losses.clipped_share(value, reward=jnp.array([9.0, 11.0, 99.0]), mask=mask, beta=1.0)
    np.testing.assert_allclose(share, [0, 0.5, 0])
    np.testing.assert_allclose(
        losses.clipped_share(value, reward=jnp.array([11.0, 1.0, 0.0]), mask=mask, beta=0.5)[0], 1
    )


def test_exceedance_minimiser_is_the_probability():
    with jax.enable_x64(True):
        utility = jnp.array([0.0, 1.0, 2.0, 3.0])
        mask = jnp.ones((4, 1), bool)

        def loss(logit):
            return losses.exceedance(jnp.full((4, 1), logit), utility=utility, threshold=jnp.full(4, 2.5), mask=mask)

        np.testing.assert_allclose(jax.grad(loss)(jnp.log(0.25 / 0.75)), 0, atol=1e-12)

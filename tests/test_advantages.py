"""Advantages: literal numbers, reductions, rows of unequal length."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import advantages

MASK = jnp.array([[1, 1, 1], [1, 0, 0]], bool)


def test_token_rewards_sum_to_the_regularised_reward():
    ratio = jnp.array([[0.5, -1.0, 2.0], [1.0, np.nan, np.nan]])
    found = advantages.token_rewards(jnp.array([3.0, 4.0]), log_ratio=ratio, mask=MASK, beta=0.1)
    np.testing.assert_allclose(found, [[-0.05, 0.1, 3 - 0.2], [3.9, 0, 0]], rtol=1e-6)


def test_generalised_advantages_in_literal_numbers():
    reward, value = jnp.array([[1.0, 0.0, 2.0], [5.0, 7.0, 7.0]]), jnp.array([[0.5, 1.0, 1.5], [2.0, 9.0, 9.0]])
    # δ = (1 + 1 − 0.5, 0 + 1.5 − 1, 2 − 1.5) = (1.5, 0.5, 0.5); with decay ½: A_2 = 0.5, A_1 = 0.75, A_0 = 1.875.
    found, returns = advantages.gae(reward, value=value, mask=MASK, decay=0.5)
    np.testing.assert_allclose(found, [[1.875, 0.75, 0.5], [3, 0, 0]])
    np.testing.assert_allclose(returns, [[2.375, 1.75, 2.0], [5, 0, 0]])


def test_with_decay_one_the_returns_are_the_rewards_to_come():
    reward, value = jnp.array([[1.0, 0.0, 2.0], [5.0, 0.0, 0.0]]), jnp.array([[0.5, 1.0, 1.5], [2.0, 9.0, 9.0]])
    returns = advantages.gae(reward, value=value, mask=MASK, decay=1.0)[1]
    np.testing.assert_allclose(returns, [[3, 2, 2], [5, 0, 0]])


def test_leave_one_out_compares_with_the_mean_of_the_others():
    np.testing.assert_allclose(
        advantages.leave_one_out(jnp.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])), [[-3, -1.5, 4.5], [0, 0, 0]], atol=1e-6
    )


def test_group_relative_advantages_have_unit_spread_and_equal_rewards_give_none():
    found = advantages.group_relative(jnp.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]), epsilon=0.0001)
    np.testing.assert_allclose(found[0], np.array([-2, -1, 3]) / (np.sqrt(7) + 1e-4), rtol=1e-6)
    np.testing.assert_array_equal(found[1], 0)


def test_a_group_of_one_has_no_baseline():
    for f in (advantages.leave_one_out, advantages.group_relative):
        with pytest.raises(ValueError, match="reward: expected at least 2 samples"):
            f(jnp.ones((3, 1)))


def test_beta_follows_the_kl_to_its_target():
    np.testing.assert_allclose(advantages.adapt_beta(1.0, kl=10.0, target=2.0), 1.02)
    np.testing.assert_allclose(advantages.adapt_beta(1.0, kl=0.0, target=2.0), 0.98)
    np.testing.assert_allclose(advantages.adapt_beta(1.0, kl=2.2, target=2.0), 1.01, rtol=1e-6)


def test_what_a_token_leads_to_is_the_kl_of_the_states_after_it():
    kl, mask = jnp.array([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]]), jnp.array([[True] * 3, [True, True, False]])
    ahead = advantages.following(kl, mask=mask)
    np.testing.assert_array_equal(ahead, [[2, 4, 0], [5, 0, 0]])
    np.testing.assert_array_equal(advantages.to_come(ahead), [[6, 4, 0], [5, 0, 0]])

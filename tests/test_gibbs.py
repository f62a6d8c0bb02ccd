"""Closed-form policies: literal numbers, stability over eight decades of beta, gradients, and the matched KL."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign import gibbs
from jaxalign._arrays import NEGATIVE


def tables(seed: int, shape=(3, 7), dtype="float64"):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.nn.log_softmax(jax.random.normal(keys[0], shape, dtype)), jax.random.normal(keys[1], shape, dtype)


def test_worked_example_of_the_readme():
    log_base, utility = jnp.log(jnp.array([0.9, 0.1])), jnp.array([1.0, 2.0])
    for reward, policy, value in (
        (utility, (0.768, 0.232), 1.232),
        (jnp.array([0.0, 3.0]), (0.309, 0.691), 1.691),
    ):
        log_policy = gibbs.log_policy(log_base, reward, beta=1.0)
        np.testing.assert_allclose(jnp.exp(log_policy), policy, atol=5e-4)
        np.testing.assert_allclose(gibbs.utility(log_policy, utility), value, atol=5e-4)


def test_log_partition_is_the_optimal_value_and_no_policy_exceeds_it():
    with jax.enable_x64(True):
        log_base, reward = tables(0)
        for beta in (0.1, 1.0, 10.0):
            policy = gibbs.log_policy(log_base, reward, beta=beta)
            value = gibbs.utility(policy, reward) - beta * gibbs.kl(policy, log_base)
            np.testing.assert_allclose(beta * gibbs.log_partition(log_base, reward, beta=beta), value, rtol=1e-12)
            for seed in range(20):
                other = tables(seed + 100)[0]
                assert (gibbs.utility(other, reward) - beta * gibbs.kl(other, log_base) < value + 1e-12).all()


@pytest.mark.parametrize("beta", [1e-4, 1e-2, 1.0, 1e2, 1e4])
def test_float32_is_stable_over_eight_decades_of_beta(beta):
    with jax.enable_x64(True):
        log_base, reward = tables(1)
        offset = 50.0
        exact = gibbs.log_policy(log_base, reward + offset, beta=beta)
        exact_z = gibbs.log_partition(log_base, reward + offset, beta=beta)
        narrow = [x.astype("float32") for x in (log_base, reward + offset)]
        found = gibbs.log_policy(*narrow, beta=np.float32(beta))
        assert found.dtype == "float32"
        # The float32 reward itself is off by 4e-6 at 50: compare where that is the only error.
        rounded = gibbs.log_policy(log_base, narrow[1].astype("float64"), beta=float(np.float32(beta)))
        np.testing.assert_allclose(jnp.exp(found), jnp.exp(rounded), atol=2e-6)
        np.testing.assert_allclose(jnp.exp(found).sum(-1), 1, atol=1e-6)
        np.testing.assert_allclose(
            gibbs.log_partition(*narrow, beta=np.float32(beta)), exact_z, rtol=1e-5, atol=1e-5 / min(beta, 1)
        )
        assert np.isfinite(exact).all()
        gradient = jax.grad(lambda r: (gibbs.log_policy(narrow[0], r, beta=beta)[:, 0]).sum())(narrow[1])
        assert np.isfinite(gradient).all()


def test_limits_in_beta():
    with jax.enable_x64(True):
        log_base, reward = tables(2)
        np.testing.assert_allclose(gibbs.log_policy(log_base, reward, beta=1e9), log_base, atol=1e-8)
        greedy = jnp.exp(gibbs.log_policy(log_base, reward, beta=1e-6))
        np.testing.assert_allclose(greedy, jax.nn.one_hot(reward.argmax(-1), 7), atol=1e-12)


def test_beta_per_row_and_unnormalised_base():
    with jax.enable_x64(True):
        log_base, reward = tables(3)
        beta = jnp.array([0.1, 1.0, 5.0])
        together = gibbs.log_policy(log_base + 3.0, reward, beta=beta)
        for i in range(3):
            np.testing.assert_allclose(together[i], gibbs.log_policy(log_base[i], reward[i], beta=beta[i]), rtol=1e-12)


@pytest.mark.parametrize("absent", [-np.inf, NEGATIVE])
def test_entries_outside_the_base_have_no_mass_and_no_gradient(absent):
    log_base, reward = tables(4, (5,), "float32")
    log_base = log_base.at[2].set(absent)
    reward = reward.at[2].set(1e6)

    def value(log_base, reward, beta):
        policy = gibbs.log_policy(log_base, reward, beta=beta)
        return (
            gibbs.utility(policy, reward)
            + gibbs.kl(policy, log_base)
            + gibbs.log_partition(log_base, reward, beta=beta)
        )

    assert np.isfinite(value(log_base, reward, 0.5))
    gradient = jax.grad(value, argnums=(0, 1, 2))(log_base, reward, 0.5)
    assert all(np.isfinite(g).all() for g in gradient)
    assert gradient[0][2] == 0
    assert gradient[1][2] == 0
    assert jnp.exp(gibbs.log_policy(log_base, reward, beta=0.5))[2] == 0


def test_kl_is_infinite_outside_the_support_and_zero_at_equality():
    log_p = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    log_q = jnp.log(jnp.array([1.0, 0.0, 0.0]))
    assert gibbs.kl(log_p, log_q) == jnp.inf
    np.testing.assert_allclose(gibbs.kl(log_q, log_p), np.log(2), rtol=1e-6)
    assert gibbs.kl(log_p, log_p) == 0


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        log_base, reward = tables(5)
        beta = jnp.array([0.3, 1.0, 4.0])
        policy = jax.jit(lambda l, r, b: gibbs.log_policy(l, r, beta=b))
        partition = jax.jit(lambda l, r, b: gibbs.log_partition(l, r, beta=b))
        check_grads(policy, (log_base, reward, beta), order=2, rtol=1e-5)
        check_grads(partition, (log_base, reward, beta), order=2, rtol=1e-5)
        check_grads(jax.jit(gibbs.kl), (tables(6)[0], log_base), order=1, rtol=1e-5)
        # d(beta·log Z)/dr is the policy.
        gradient = jax.grad(lambda r: (beta * gibbs.log_partition(log_base, r, beta=beta)).sum())(reward)
        np.testing.assert_allclose(gradient, jnp.exp(gibbs.log_policy(log_base, reward, beta=beta)), rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_match_kl_meets_the_budget(dtype):
    with jax.enable_x64(True):
        log_base, reward = tables(7, (4, 50), dtype)
        for budget in (1e-4, 1e-2, 0.5, 2.0):
            beta = gibbs.match_kl(log_base, reward, kl=budget)
            assert beta.dtype == dtype
            wide = [jnp.asarray(x, "float64") for x in (log_base, reward, beta)]
            # A float32 base sums to 1 up to 1e-7, which is 1e-3 of the smallest budget: normalise before comparing.
            normal = jax.nn.log_softmax(wide[0])
            found = gibbs.kl(gibbs.log_policy(normal, wide[1], beta=wide[2]), normal)
            np.testing.assert_allclose(found, budget, rtol=1e-9 if dtype == "float64" else 5e-4)


def test_match_kl_is_differentiated_through_its_root():
    with jax.enable_x64(True):
        log_base, reward = tables(8)
        budget = jnp.array([0.05, 0.3, 0.8])
        check_grads(
            lambda l, r, c: gibbs.match_kl(l, r, kl=c), (log_base, reward, budget), order=1, rtol=1e-4, eps=1e-5
        )
        # By hand: d beta/d kl = −beta³/Var_pi(r).
        beta = gibbs.match_kl(log_base, reward, kl=budget)
        policy = gibbs.log_policy(log_base, reward, beta=beta)
        variance = gibbs.utility(policy, reward**2) - gibbs.utility(policy, reward) ** 2
        found = jax.grad(lambda c: gibbs.match_kl(log_base, reward, kl=c).sum())(budget)
        np.testing.assert_allclose(found, -(beta**3) / variance, rtol=1e-8)
        # A chain: the utility of the matched policy rises with the budget by beta per nat.
        rise = jax.grad(
            lambda c: gibbs.utility(
                gibbs.log_policy(log_base, reward, beta=gibbs.match_kl(log_base, reward, kl=c)), reward
            ).sum()
        )(budget)
        np.testing.assert_allclose(rise, beta, rtol=1e-8)


def test_match_kl_is_clamped_with_zero_gradient_where_no_root_exists():
    with jax.enable_x64(True):
        base, reward = jnp.array([0.5, 0.3, 0.2]), jnp.array([1.0, 4.0, 4.0])
        limit = -np.log(0.5)  # the mass of both best responses
        clamp = 1e-6 * 3.0
        for budget in (limit, limit + 1.0):
            assert gibbs.match_kl(jnp.log(base), reward, kl=budget) == pytest.approx(clamp)
            gradient = jax.grad(lambda l, r, c: gibbs.match_kl(l, r, kl=c), argnums=(0, 1, 2))(
                jnp.log(base), reward, budget
            )
            assert all((g == 0).all() for g in gradient)
        assert gibbs.match_kl(jnp.log(base), reward, kl=limit - 1e-3) > 10 * clamp
        assert gibbs.match_kl(jnp.log(base), jnp.ones(3), kl=0.1) == 1.0


def test_bad_input_is_named():
    log_base, reward = tables(9, dtype="float32")
    for beta in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="beta: expected a value > 0"):
            gibbs.log_policy(log_base, reward, beta=beta)
    for budget in (0.0, -0.1, np.inf):
        with pytest.raises(ValueError, match="kl: expected"):
            gibbs.match_kl(log_base, reward, kl=budget)


def test_jit_and_vmap():
    log_base, reward = tables(10, dtype="float32")
    direct = gibbs.match_kl(log_base, reward, kl=0.2)
    mapped = jax.jit(jax.vmap(lambda l, r: gibbs.match_kl(l, r, kl=0.2)))(log_base, reward)
    np.testing.assert_allclose(mapped, direct, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_match_kl_at_the_exact_limit_is_the_clamp(dtype):
    """The budget −log base(best), computed with other roundings than ours, for 500 bases."""
    with jax.enable_x64(True):
        logits = jax.random.normal(jax.random.key(3), (500, 40), dtype)
        reward = jax.random.normal(jax.random.key(4), (500, 40), dtype)
        limit = -jnp.take_along_axis(jax.nn.log_softmax(logits), reward.argmax(-1, keepdims=True), axis=-1)[:, 0]
        beta = gibbs.match_kl(logits, reward, kl=limit)
        np.testing.assert_allclose(beta, 1e-6 * (reward.max(-1) - reward.min(-1)), rtol=1e-5)
        assert (gibbs.match_kl(logits, reward, kl=limit * 0.5) > 10 * beta).all()

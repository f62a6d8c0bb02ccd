"""Small differences of large numbers, and numbers near 0: what is computed from them keeps its digits in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import advantages, decoding, losses, metrics, pools, shaping, tree
from jaxalign._arrays import is_flat, is_flat_on_host
from jaxalign.infalign import transforms
from jaxalign.shaping import baselines
from jaxalign.training import laws

PROCESS = tree.Tree(4, 2)
BETAS = [1e2, 1e4, 1e6, 1e8]


@pytest.mark.parametrize("beta", [1e-4, 1.0, *BETAS])
def test_soft_values_go_to_the_mean_at_a_large_beta(beta):
    base, reward = tree.random(jax.random.key(0), PROCESS)
    p, r = np.exp(np.float64(tree.response_log_prob(PROCESS, base))), np.float64(reward)
    p /= p.sum()
    exact = r.max() + beta * np.log1p((p * np.expm1((r - r.max()) / beta)).sum())
    found = tree.soft_value(PROCESS, base, reward, beta=beta)[0]
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [1e-3, 0.3, *BETAS])
def test_a_soft_minimum_lies_between_the_least_and_the_mean(tau):
    scores = np.asarray([0.1, 0.5, 0.9])
    exact = 0.1 - tau * np.log1p(np.expm1((0.1 - scores) / tau).mean())
    of_vector = pools.soft_minimum(tau)(None, jnp.asarray([scores], jnp.float32))
    of_table = pools.soft_minimum(tau)(None, jnp.asarray([scores, scores + 1], jnp.float32).T[None])
    np.testing.assert_allclose(of_vector[0], exact, rtol=1e-6)
    np.testing.assert_allclose(of_table[0], [exact, exact + 1], rtol=1e-6)


@pytest.mark.parametrize("gain", [1e-8, 1e-3, 0.9, 1.1, 30.0, 200.0])
def test_the_weight_of_a_prefix_keeps_its_digits_at_every_gain(gain):
    p = np.asarray([0.01, 0.3, 0.99])
    exact = np.logaddexp(np.log1p(-p), gain + np.log(p)) if gain > 1 else np.log1p(p * np.expm1(gain))
    logit = jnp.asarray(np.log(p / (1 - p)), jnp.float32)
    np.testing.assert_allclose(shaping.exceedance_log_weight(logit, gain=gain), exact, rtol=1e-5)
    found = shaping.exceedance_soft_value(jnp.asarray(p, jnp.float32), bound=gain * 1e4, beta=1e4)
    np.testing.assert_allclose(found, 1e4 * exact, rtol=1e-5)
    slope = jax.grad(lambda x: shaping.exceedance_log_weight(x, gain=gain).sum())(logit)
    q = np.expm1(min(gain, 80.0))
    np.testing.assert_allclose(slope, q * p * (1 - p) / (1 + q * p), rtol=1e-4)
    answer = shaping.mixture(jnp.asarray([0.0, 1.0]), threshold=0.5, gain=gain)
    np.testing.assert_allclose(answer.share, 1 - 1 / (1 + 0.5 * q) if gain > 1e-6 else gain / 2, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0, *BETAS])
def test_the_loss_of_a_soft_value_and_its_gradient_are_right_at_every_beta(beta):
    value, reward = np.asarray([0.3, 0.6, 1.5]), 1.0
    d = (reward - value) / beta
    small = np.abs(d) < 1e-3
    exact = np.where(small, d**2 / 2 + d**3 / 6, np.expm1(d) - d)

    def loss(value):
        return losses.soft_value(value[None], reward=jnp.ones(1), mask=jnp.ones((1, 3), bool), beta=beta)

    found, slope = jax.value_and_grad(loss)(jnp.asarray(value, jnp.float32))
    np.testing.assert_allclose(found, exact.sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, -np.expm1(d) / beta, rtol=1e-5)
    curve = jax.hessian(loss)(jnp.asarray(value, jnp.float32))
    np.testing.assert_allclose(jnp.diag(curve), np.exp(d) / beta**2, rtol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "beta", "bound"), [(1e6 + np.arange(8), 1.0, 1e6), (1e-6 * np.arange(8), 1e-6, 0.0)]
)
def test_rejection_refuses_a_reward_above_the_bound_whatever_its_size(rewards, beta, bound):
    base, _ = tree.random(jax.random.key(0), PROCESS)
    table = jnp.asarray(np.resize(rewards, PROCESS.num_responses), jnp.float32)
    params = {"policy": base, "reward": table, "beta": beta}
    given = (tree.policy(PROCESS), tree.reward(PROCESS))
    limits = {"max_tries": 4, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="bound: expected at least every reward, found up to"):
        decoding.rejection(*given, params | {"bound": bound}, jax.random.key(1), tree.prompts(20), **limits)
    decoding.rejection(*given, params | {"bound": table.max()}, jax.random.key(1), tree.prompts(20), **limits)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20])
def test_standardised_rewards_do_not_depend_on_their_size(size):
    r = jnp.asarray([1.0, 2.0, 4.0]) * size
    expected = (np.asarray([1.0, 2, 4]) - 7 / 3) / np.std([1.0, 2, 4], ddof=1)
    np.testing.assert_allclose(advantages.group_relative(r, epsilon=0.0), expected, rtol=1e-5)
    if size >= 1:
        np.testing.assert_allclose(
            baselines.meanstd(r, reference=r), expected * np.sqrt(3 / 2), rtol=1e-5
        )  # of n in place of n − 1


def test_a_group_with_an_infinite_reward_is_not_flat():
    for bad in (np.inf, -np.inf, np.nan):
        assert not is_flat(jnp.asarray([bad, 1.0, 2.0]))
        assert np.isnan(advantages.group_relative(jnp.asarray([bad, 1.0, 2.0]))).any()


def test_numbers_that_are_equal_up_to_rounding_have_no_spread():
    same = np.full(10, 0.7, np.float32)
    assert same.var() > 0  # of rounding
    assert is_flat_on_host(same)
    assert is_flat_on_host(np.full(7, 0.7))
    assert not is_flat_on_host(np.asarray([0.7, 0.7001]))
    assert laws.betas_of(np.full(7, 0.7)) == laws.betas_of(np.asarray([0.0])) == [0.25, 0.5, 1.0, 2.0, 4.0]


def test_a_reward_without_an_end_is_refused():
    base, _ = tree.random(jax.random.key(0), PROCESS)
    table = jnp.zeros(PROCESS.num_responses).at[3].set(jnp.inf)
    params = {"policy": base, "reward": table, "beta": 1.0}
    with pytest.raises(ValueError, match="reward: expected numbers < inf, found inf for prompts"):
        decoding.smc(
            tree.policy(PROCESS),
            tree.reward(PROCESS),
            params,
            jax.random.key(1),
            tree.prompts(64),
            num_particles=4,
            max_new_tokens=2,
        )


def test_forbidden_samples_leave_no_nan_in_the_curve_of_best_of_n():
    reward = np.r_[np.full(1000, -np.inf), np.random.default_rng(0).normal(size=1000)]
    curve = metrics.best_of_n_curve(reward)
    assert not np.isnan(curve).any()
    np.testing.assert_allclose(curve[-1], reward.max(), rtol=1e-12)
    assert np.isneginf(curve[0])


def test_targets_of_a_group_may_share_any_offset():
    x, k = jnp.asarray([0.1, -0.2, 0.3, 0.05]), jnp.asarray([0.0, 1.0, 2.0, 3.0])
    group = jnp.asarray([0, 0, 1, 1])
    near = losses.regress(x, k, form="square", group=group)
    far = losses.regress(x, k + 2.0**20, form="square", group=group)
    np.testing.assert_allclose(far, near, rtol=1e-6)


def test_a_beta_of_each_row_is_not_one_of_each_token():
    beta, mask = jnp.asarray([1.0, 2.0]), jnp.ones((2, 2), bool)
    ratio, reward = jnp.asarray([[0.1, 0.2], [0.3, 0.4]]), jnp.asarray([1.0, 3.0])
    rows = advantages.token_rewards(reward, log_ratio=ratio, mask=mask, beta=beta)
    each = [
        advantages.token_rewards(reward[i : i + 1], log_ratio=ratio[i : i + 1], mask=mask[:1], beta=beta[i])[0]
        for i in range(2)
    ]
    np.testing.assert_allclose(rows, jnp.stack(each))
    both = losses.soft_value(ratio, reward=reward, mask=mask, beta=beta)
    alone = [
        losses.soft_value(ratio[i : i + 1], reward=reward[i : i + 1], mask=mask[:1], beta=beta[i]) for i in range(2)
    ]
    np.testing.assert_allclose(both, np.mean(alone), rtol=1e-6)


def test_the_error_of_a_grid_has_a_slope_at_every_width():
    for h in (1e-3, 0.2, 1.0, 1e6):
        slope = jax.grad(lambda h: losses.grid_error(h, beta=1.0))(h)
        assert 0 <= float(slope) < 1


@pytest.mark.parametrize("a", [1e39, 1e-45, 0.0, np.inf, np.nan])
def test_an_exponential_transform_that_float32_has_not_is_refused(a):
    with pytest.raises(ValueError, match="a: expected a finite number that is not 0"):
        transforms.exponential(a)

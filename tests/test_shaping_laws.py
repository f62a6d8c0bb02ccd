"""Threshold shaping: what the policies that follow it deliver (T5 to T10), in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import gibbs, shaping, tree
from tests import exact
from tests.test_shaping import TREE, answer, delivered, random, scaled_f


@pytest.fixture(autouse=True)
def _float64():
    """Identities hold in float64; tests of float32 pass arrays of that type."""
    with jax.enable_x64(True):
        yield


def soft_utility(u, log_base, gain, sharpness):
    m = shaping.optimal_threshold(u, log_base=log_base, gain=gain)
    return delivered(shaping.soft_threshold_reward(u, threshold=m, bound=gain, sharpness=sharpness), u, log_base)


def test_stackelberg_T5_the_soft_reward_runs_from_the_base_to_the_hard_threshold():
    log_base, u = random(10, 200, 8)
    best = shaping.optimal_threshold(u, log_base=log_base, gain=2.0)
    np.testing.assert_allclose(soft_utility(u, log_base, 2.0, 0.0), gibbs.utility(log_base, u), atol=1e-13)
    np.testing.assert_allclose(soft_utility(u, log_base, 2.0, 1e9), best, atol=1e-9)
    assert (soft_utility(u, log_base, 2.0, np.geomspace(1e-3, 1e4, 30)[:, None]) <= best + 1e-12).all()


def test_stackelberg_T5_utility_may_fall_as_the_sharpness_rises():
    log_base, u = random(11, 500, 6)
    path = soft_utility(u, log_base, 10.0, np.geomspace(0.05, 200, 60)[:, None])
    falls = (np.diff(path, axis=0) < -1e-6).any(axis=0)
    assert 1 <= falls.sum() <= 50, falls.sum()
    assert np.diff(path, axis=0).min() < -0.01


def test_stackelberg_T6_beats_the_raw_reward_if_its_range_is_within_the_bound():
    log_base, u = random(12, 400, 8)
    within = u * (2.0 / (u.max(-1, keepdims=True) - u.min(-1, keepdims=True)))
    grid = np.array([0.5, 1, 2, 5, 20, 1e3, 1e6, 1e9])[:, None]
    for utility, always in ((within, True), (4 * within, False)):
        best = soft_utility(utility, log_base, 2.0, grid).max(axis=0)
        raw = delivered(utility, utility, log_base)
        ahead = raw > best + 1e-9
        assert not ahead.any() if always else ahead.mean() > 0.5
    # By hand: a bound of 0.1 moves little, the unbounded raw reward much.
    base, two = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, 3.0])
    assert delivered(two, two, base) > 2.8
    assert shaping.optimal_threshold(two, log_base=base, gain=0.1) < 1.6


def threshold_on_tree(seed: int, gain: float, dtype="float64"):
    """(log_ref [S,V], utility, base law, indicator of u > m [M], p(sz) [S,V])."""
    log_ref, u = (x.astype(dtype) for x in exact.tables(TREE, seed))
    base = tree.response_log_prob(TREE, log_ref)
    exceeds = shaping.threshold_reward(
        u, threshold=shaping.optimal_threshold(u, log_base=base, gain=gain), bound=np.ones((), dtype)
    )
    p = tree.value(TREE, log_ref, exceeds)
    return log_ref, u, base, exceeds, jnp.clip(tree.q_values(TREE, p, reward=exceeds), 0, 1)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float64", 3e-15)])
@pytest.mark.parametrize("gain", [0.5, 2.0, 6.0])
def test_stackelberg_T7_the_classifier_form_multiplies_up_to_the_sequence_optimum(gain, dtype, atol):
    log_ref, _, base, exceeds, p = threshold_on_tree(1, gain, dtype)
    q = shaping.exceedance_log_weight(jnp.log(p) - jnp.log1p(-p), gain=np.asarray(gain, dtype))
    assert q.dtype == dtype
    level = tree.critic(TREE, "level")
    wanted = np.exp(exact.gibbs_law(base.astype("float64"), gain * exceeds.astype("float64"), 1.0))
    found = exact.tilted_law(TREE, log_ref, level, q, beta=np.ones((), dtype))
    np.testing.assert_allclose(np.exp(found), wanted, atol=atol)
    # Controlled decoding's value of the same reward gives another policy.
    other = exact.tilted_law(TREE, log_ref, level, gain * p, beta=np.ones((), dtype))
    assert np.abs(np.exp(other) - wanted).max() > 1e-3


def test_stackelberg_T7_values_of_the_threshold_reward():
    for seed, (bound, beta) in enumerate([(1.0, 2.0), (2.0, 1.0), (3.0, 0.4)]):
        gain = bound / beta
        log_ref, _, _, exceeds, _ = threshold_on_tree(seed, gain)
        reward = bound * exceeds
        p = tree.value(TREE, log_ref, exceeds)
        inner = np.asarray(TREE.alive & (p > 0) & (p < 1 - 1e-12))
        k = np.exp(gain)
        np.testing.assert_allclose(tree.value(TREE, log_ref, reward), bound * p, atol=1e-14)
        soft = tree.soft_value(TREE, log_ref, reward, beta=beta)[inner]
        p = p[inner]
        np.testing.assert_allclose(soft, beta * np.log(1 + (k - 1) * p), rtol=1e-12)
        np.testing.assert_allclose(soft, shaping.exceedance_soft_value(p, bound=bound, beta=beta), rtol=1e-12)
        logit = jnp.log(p) - jnp.log1p(-p)
        np.testing.assert_allclose(soft, beta * shaping.exceedance_log_weight(logit, gain=gain), rtol=1e-11)
        transfer = tree.transfer_value(TREE, log_ref, reward, beta=beta)[inner]
        np.testing.assert_allclose(transfer, bound * k * p / (1 + (k - 1) * p), rtol=1e-12)
        assert len(p) > 3


def test_stackelberg_T7_the_exponential_lies_below_its_chord():
    p = jnp.linspace(1e-6, 1 - 1e-6, 201)
    for gain in (0.01, 1.0, 8.0, 200.0):
        weight = shaping.exceedance_log_weight(jnp.log(p) - jnp.log1p(-p), gain=gain)
        assert (gain * p < weight + 1e-12).all()
    ends = shaping.exceedance_log_weight(jnp.array([-jnp.inf, -1e4, 1e4, jnp.inf]), gain=3.0)
    np.testing.assert_allclose(ends, [0, 0, 3, 3], atol=1e-12)
    far = jnp.linspace(-300, 300, 61, dtype=jnp.float32)
    slope = jax.vmap(jax.grad(lambda x: shaping.exceedance_log_weight(x, gain=50.0)))(far)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("gain", [0.0, 0.5, 3.0, 30.0, 500.0])
def test_stackelberg_T7_mixture_and_rejection_follow_the_optimal_law(gain):
    log_base, u = random(13, 9)
    base = np.exp(log_base)
    m = shaping.optimal_threshold(u, log_base=log_base, gain=gain)
    above = np.asarray(u > m)
    wanted = np.exp(gibbs.log_policy(log_base, gain * above, beta=1.0))
    for unnormalised in (log_base, log_base + 3.0):
        share, exceed, log_norm = shaping.mixture(u, log_base=unnormalised, threshold=m, gain=gain)
        np.testing.assert_allclose(exceed, base[above].sum(), rtol=1e-13)
        np.testing.assert_allclose((1 - share) * base + share * base * above / exceed, wanted, atol=1e-14)
        np.testing.assert_allclose(log_norm, np.log(1 + np.expm1(gain) * exceed), rtol=1e-12, atol=1e-15)
    kept = base * np.exp(shaping.accept_log_prob(u, threshold=m, gain=gain))
    np.testing.assert_allclose(kept / kept.sum(), wanted, atol=1e-14)
    np.testing.assert_allclose(np.log(kept.sum()), log_norm - gain, rtol=1e-12, atol=1e-14)


def test_mixture_of_samples_and_of_responses_none_or_all_of_which_exceed():
    u = jnp.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(shaping.mixture(u, log_base=None, threshold=1.5, gain=2.0).exceed, 0.5)
    none, every = (
        shaping.mixture(u, log_base=None, threshold=9.0, gain=2.0),
        shaping.mixture(u, log_base=None, threshold=-1.0, gain=2.0),
    )
    np.testing.assert_allclose([none.share, none.exceed, none.log_norm], 0, atol=1e-15)
    np.testing.assert_allclose([every.share, every.exceed, every.log_norm], [1 - np.exp(-2), 1, 2])


def test_stackelberg_T8_error_of_the_estimate_is_bounded_and_its_loss_is_of_second_order():
    for seed in range(60):
        log_base, u = random(seed, 40)
        gain = (0.5, 2.0, 4.0)[seed % 3]
        sample = np.random.default_rng(seed).choice(u, 15, p=np.exp(log_base))
        true = float(shaping.optimal_threshold(u, log_base=log_base, gain=gain))
        found = float(shaping.optimal_threshold(sample, gain=gain))
        # The difference is piecewise linear: its supremum is at a utility.
        gap = scaled_f(u, sample, np.zeros(15), gain) - scaled_f(u, u, log_base, gain)
        assert abs(found - true) <= np.exp(gain) * np.abs(gap).max() + 1e-12
        loss = true - delivered(shaping.threshold_reward(u, threshold=found, bound=gain), u, log_base)
        z = np.exp(shaping.mixture(u, log_base=log_base, threshold=found, gain=gain).log_norm)
        low, high = min(found, true), max(found, true)
        between = np.exp(log_base)[(u >= low) & (u <= high)].sum()
        assert -1e-12 <= loss <= np.expm1(gain) / z * (high - low) * between + 1e-12


def test_stackelberg_T9_at_equal_kl_the_tilt_is_never_behind_the_threshold():
    log_base, u = random(14, 400, 50)
    gain = jnp.tile(jnp.array([0.5, 1.0, 2.0, 3.0]), 100)
    m = shaping.optimal_threshold(u, log_base=log_base, gain=gain)
    reward = shaping.threshold_reward(u, threshold=m, bound=gain)
    budget = gibbs.kl(gibbs.log_policy(log_base, reward, beta=1.0), log_base)
    tilted = gibbs.utility(gibbs.log_policy(log_base, u, beta=gibbs.match_kl(log_base, u, kl=budget)), u)
    assert (tilted >= m).all()
    mean = gibbs.utility(log_base, u)
    assert 0.8 < ((m - mean) / (tilted - mean)).mean() < 0.9


@pytest.mark.parametrize(
    ("gain", "threshold", "kl", "tilt"),
    [(1.0, 0.397, 0.123, 0.497), (2.0, 0.787, 0.474, 0.974), (3.0, 1.161, 1.006, 1.418), (6.0, 2.166, 3.208, 2.533)],
)
def test_stackelberg_T9_numbers_of_a_gaussian_utility(gain, threshold, kl, tilt):
    u = jnp.linspace(-9, 9, 6001)
    log_base = jax.nn.log_softmax(-(u**2) / 2)
    policy = answer(u, log_base, gain)
    budget = gibbs.kl(policy, log_base)
    tilted = gibbs.utility(gibbs.log_policy(log_base, u, beta=gibbs.match_kl(log_base, u, kl=budget)), u)
    np.testing.assert_allclose([gibbs.utility(policy, u), budget, tilted], [threshold, kl, tilt], atol=2e-3)
    np.testing.assert_allclose(tilted, np.sqrt(2 * budget), atol=1e-5)


def test_stackelberg_T10_minmax_is_the_raw_reward_where_its_bound_does_not_bind():
    log_base, u = random(15, 20, 10)
    free = shaping.minmax(u, reference=u, bound=1e3, range_factor=1.01)
    np.testing.assert_allclose(free - 1.01 * u, (free - 1.01 * u)[:, :1] * jnp.ones(10), atol=1e-12)
    np.testing.assert_allclose(
        gibbs.log_policy(log_base, free, beta=0.7), gibbs.log_policy(log_base, 1.01 * u, beta=0.7), atol=1e-12
    )
    bound = shaping.minmax(u, reference=u, bound=0.5, range_factor=1.01)
    np.testing.assert_allclose(bound.max(-1) - bound.min(-1), 0.5, rtol=1e-12)
    gap = gibbs.log_policy(log_base, bound, beta=0.7) - gibbs.log_policy(log_base, 1.01 * u, beta=0.7)
    assert (jnp.abs(gap).max(-1) > 0.1).all()

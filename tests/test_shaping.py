"""Stackelberg shaping in closed form: the exact properties of its specification (section 6), and the baselines."""

from __future__ import annotations

import decimal
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign import gibbs, shaping, tree
from tests import exact

GAINS = (0.0, 1e-3, 1.0, 10.0, 60.0, 86.0, 88.0, 100.0, 160.0, 161.0, 1e3, 1e4)
TREE = tree.Tree(3, 4, eos_id=0)


@pytest.fixture(autouse=True)
def _float64():
    """Identities hold in float64; tests of float32 pass arrays of that type."""
    with jax.enable_x64(True):
        yield


def random(seed: int, *shape: int) -> tuple[jax.Array, jax.Array]:
    """(log base weights, utilities), normal logits and normal utilities."""
    rng = np.random.default_rng(seed)
    logit, utility = rng.normal(size=(2, *shape))
    return jnp.asarray(logit - np.logaddexp.reduce(logit, axis=-1, keepdims=True)), jnp.asarray(utility)


def delivered(reward, utility, log_base, *, beta=1.0):
    return gibbs.utility(gibbs.log_policy(log_base, reward, beta=beta), utility)


def answer(utility, log_base, gain):
    """log pi* of the threshold reward, beta 1."""
    m = shaping.optimal_threshold(utility, log_base, gain=gain)
    return gibbs.log_policy(log_base, shaping.threshold_reward(utility, m, bound=gain), beta=1.0)


def present(utility, log_base) -> tuple[np.ndarray, np.ndarray]:
    """(weights, utilities) that count, in plain numpy."""
    log_weight, utility = np.asarray(log_base, np.float64), np.asarray(utility, np.float64)
    log_weight = log_weight - np.logaddexp.reduce(log_weight)
    inside = log_weight >= -87
    return np.exp(log_weight[inside]), utility[inside]


def sorted_prefix(utility, log_base, gain) -> float:
    """Section 1.2: the maximum over the sets of the j best, sums of all terms of one sign."""
    p, u = present(utility, log_base)
    order = np.argsort(-u)
    p, below = p[order], u[order] - u.max()
    rest = lambda x: x[::-1].cumsum()[::-1] - x  # noqa: E731
    low = np.exp(-gain)
    value = (np.cumsum(p * below) + low * rest(p * below)) / (np.cumsum(p) + low * rest(p))
    return value.max() + u.max()


def scaled_f(m, utility, log_base, gain) -> np.ndarray:
    """e^−gain·F at each m [K], in plain numpy."""
    p, u = present(utility, log_base)
    m = np.asarray(m, np.float64)[..., None]
    return (p * np.where(u >= m, 1.0, np.exp(-gain)) * (u - m)).sum(axis=-1)


def bisection(utility, log_base, gain) -> float:
    """The root of F, by nested grids of 65 points."""
    _, u = present(utility, log_base)
    low, high = u.min(), u.max()
    for _ in range(12):
        grid = np.linspace(low, high, 65)
        at = np.flatnonzero(scaled_f(grid, utility, log_base, gain) >= 0).max(initial=0)
        low, high = grid[at], grid[min(at + 1, 64)]
    return (low + high) / 2


def test_stackelberg_T1_the_worked_example():
    log_base, u = jnp.log(jnp.array([0.9, 0.1])), jnp.array([1.0, 2.0])
    for reward, policy, value in ((u, (0.7680, 0.2320), 1.2320), (jnp.array([0.0, 3.0]), (0.3094, 0.6906), 1.6906)):
        log_policy = gibbs.log_policy(log_base, reward, beta=1.0)
        np.testing.assert_allclose(jnp.exp(log_policy), policy, atol=5e-5)
        np.testing.assert_allclose(shaping.leader_utility(reward, u, log_base, beta=1.0), value, atol=5e-5)
    for bound, value in ((1.0, 1.2320), (2.0, 1.4509), (3.0, 1.6906), (5.0, 1.9428)):
        m = shaping.optimal_threshold(u, log_base, gain=bound)
        np.testing.assert_allclose(m, value, atol=5e-5)
        np.testing.assert_array_equal(shaping.threshold_reward(u, m, bound=bound), [0, bound])
    # At B = 1, the range, the raw reward less its minimum is the threshold reward.
    np.testing.assert_allclose(delivered(u, u, log_base), shaping.optimal_threshold(u, log_base, gain=1.0), rtol=1e-14)


@pytest.mark.parametrize("n", range(1, 11))
def test_stackelberg_T2_no_assignment_and_no_interior_reward_beats_the_threshold(n):
    log_base, u = random(n, 8, n)
    corners = jnp.array(list(itertools.product([0.0, 1.0], repeat=n)))
    inside = np.random.default_rng(100 + n).uniform(size=(200, n))
    for gain in (0.3, 2.0, 8.0):
        best = shaping.optimal_threshold(u, log_base, gain=gain)
        reward = shaping.threshold_reward(u, best, bound=gain)
        np.testing.assert_allclose(delivered(reward, u, log_base), best, atol=1e-12)
        others = [delivered(gain * r[:, None], u, log_base).max(axis=0) for r in (corners, inside)]
        assert (others[0] <= best + 1e-12).all()
        assert (others[1] <= best + 1e-12).all()
        np.testing.assert_allclose(others[0], best, atol=1e-12)


def test_stackelberg_T2_ties_share_a_fate_and_what_sits_on_the_threshold_does_not_matter():
    log_base, u = random(0, 6)
    u = u.at[3].set(u[1])
    m = shaping.optimal_threshold(u, log_base, gain=2.0)
    merged = jnp.logaddexp(log_base[1], log_base[3])
    alone = jnp.delete(log_base, 3).at[1].set(merged)
    np.testing.assert_allclose(m, shaping.optimal_threshold(jnp.delete(u, 3), alone, gain=2.0), rtol=1e-14)
    # One more response, with a utility of exactly m*: the optimum stays, whatever it is paid.
    u, log_base = jnp.append(u, m), jnp.append(log_base + jnp.log(0.6), jnp.log(0.4))
    np.testing.assert_allclose(shaping.optimal_threshold(u, log_base, gain=2.0), m, rtol=1e-14)
    for paid in (0.0, 0.7, 2.0):
        reward = shaping.threshold_reward(u, m, bound=2.0).at[-1].set(paid)
        np.testing.assert_allclose(delivered(reward, u, log_base), m, rtol=1e-13)


def test_stackelberg_T2_newton_is_the_sorted_prefix_form_and_bisection():
    for seed in range(40):
        n = (1, 2, 3, 17, 60)[seed % 5]
        log_base, u = random(seed, n)
        log_base = 4 * log_base
        for gain in (0.0, 1e-3, 0.5, 3.0, 12.0, 40.0, 300.0):
            found = shaping.optimal_threshold(u, log_base, gain=gain)
            np.testing.assert_allclose(found, sorted_prefix(u, log_base, gain), rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(found, bisection(u, log_base, gain), rtol=1e-12, atol=1e-13)


@functools.cache
def hard_cases() -> tuple[np.ndarray, np.ndarray]:
    """(log_base, utility) [24,12] in float32: the rarer the better, down to e^−86, and shuffled ones; offsets and
    scales of the utility over eight decades."""
    rng = np.random.default_rng(0)
    log_base = np.sort(rng.uniform(-86, 0, (24, 12)), axis=-1)
    log_base[:, 0], log_base[:, -1] = -86, 0
    utility = np.sort(rng.normal(size=(24, 12)), axis=-1)[:, ::-1]
    utility[12:] = rng.permuted(utility[12:], axis=-1)
    utility = utility * 10.0 ** rng.integers(-3, 6, (24, 1)) + rng.normal(size=(24, 1)) * (np.arange(24) % 2)[:, None]
    log_base -= np.logaddexp.reduce(log_base, axis=-1, keepdims=True)
    return np.maximum(log_base, -86.9).astype(np.float32), utility.astype(np.float32)


@pytest.mark.parametrize("gain", GAINS)
def test_stackelberg_T2_float32_is_right_at_every_gain(gain):
    log_base, u = hard_cases()
    spread = u.max(axis=-1) - u.min(axis=-1)
    found = shaping.optimal_threshold(jnp.asarray(u), jnp.asarray(log_base), gain=np.float32(gain))
    assert found.dtype == "float32"
    expected = [sorted_prefix(x, w, np.float64(np.float32(gain))) for x, w in zip(u, log_base, strict=True)]
    scale = np.maximum(spread, np.abs(u).max(axis=-1))
    # e^gain magnifies the rounding of the gain and of the log weights, 4e-6 each near 86.
    np.testing.assert_allclose((found - np.array(expected)) / scale, 0, atol=1e-5)
    if gain:
        # The reward must still pay the best where the threshold rounds to it.
        reward = shaping.threshold_reward(u, found, bound=np.float32(gain))
        got = gibbs.utility(gibbs.log_policy(log_base, reward, beta=np.float32(1)), u)
        np.testing.assert_allclose((got - found) / scale, 0, atol=3e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("top", [0.0, 1.0, -3.0, 1e-30, 1e30])
def test_at_large_gains_the_best_response_alone_is_rewarded(dtype, top):
    u = jnp.asarray(top + np.array([-1.0, -2.0, 0.0, -5.0]) * max(abs(top), 1), dtype)
    for gain in (40.0, 1e4):
        m = shaping.optimal_threshold(u, gain=gain)
        np.testing.assert_array_equal(shaping.threshold_reward(u, m, bound=gain), [0, 0, gain, 0])


def test_weights_too_small_to_count_are_absent_whatever_their_utility():
    log_base = jnp.array([0.0, -1.0, -200.0, -jnp.inf, -1e20], jnp.float32)
    u = jnp.array([0.0, 1.0, 1e6, jnp.nan, jnp.inf], jnp.float32)
    for gain in (0.0, 3.0, 1e3):
        expected = shaping.optimal_threshold(u[:2], log_base[:2], gain=gain)
        for utility in (u, u.at[2].set(jnp.nan)):
            find = functools.partial(shaping.optimal_threshold, gain=gain)
            np.testing.assert_allclose(find(utility, log_base), expected, rtol=1e-6)
            gradient = jax.grad(find, argnums=(0, 1))(utility, log_base)
            assert all(np.isfinite(g).all() for g in gradient)
            assert all((g[2:] == 0).all() for g in gradient)


def test_stackelberg_T2_gradients_by_differences_and_by_the_implicit_function():
    log_base, u = random(3, 4, 9)
    gain = jnp.array([0.2, 1.0, 3.0, 6.0])
    find = lambda u, w, g: shaping.optimal_threshold(u, w, gain=g)  # noqa: E731
    check_grads(find, (u, log_base, gain), order=1, modes=["fwd", "rev"], eps=1e-6, rtol=1e-6, atol=1e-8)
    m = find(u, log_base, gain)

    def f(m, u, log_base, gain):
        weight = jax.nn.softmax(log_base) * jnp.where(u >= m[:, None], jnp.exp(gain)[:, None], 1)
        return (weight * (u - m[:, None])).sum(-1)

    slope, *parts = jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2, 3))(m, u, log_base, gain)
    found = jax.grad(lambda *x: find(*x).sum(), argnums=(0, 1, 2))(u, log_base, gain)
    for x, part in zip(found, parts, strict=True):
        np.testing.assert_allclose(x, -part / (slope[:, None] if part.ndim == 2 else slope), rtol=1e-10, atol=1e-12)
    for row in range(4):
        policy = answer(u[row], log_base[row], gain[row])
        np.testing.assert_allclose(found[0][row], jnp.exp(policy), rtol=1e-10)
        np.testing.assert_allclose(found[1][row], jnp.exp(policy) * (u - m[:, None])[row], rtol=1e-10, atol=1e-14)


def test_gradient_is_right_in_float32_at_a_gain_of_ten_thousand():
    log_base, u = jnp.log(jnp.array([0.3, 0.1, 0.45, 0.15], jnp.float32)), jnp.array([0, 1, 3, 3], jnp.float32)
    found = jax.grad(lambda u, w, g: shaping.optimal_threshold(u, w, gain=g), argnums=(0, 1, 2))(
        u, log_base, jnp.float32(1e4)
    )
    assert all(g.dtype == "float32" for g in found)
    np.testing.assert_allclose(found[0], [0, 0, 0.75, 0.25], rtol=1e-5)
    np.testing.assert_allclose(found[1], 0, atol=1e-5)
    np.testing.assert_allclose(found[2], 0, atol=1e-5)


def test_threshold_under_vmap_and_jit_and_per_prompt_gains():
    log_base, u = random(4, 2, 3, 11)
    gain = jnp.arange(6.0).reshape(2, 3)
    direct = shaping.optimal_threshold(u, log_base, gain=gain)
    one = lambda u, w, g: shaping.optimal_threshold(u, w, gain=g)  # noqa: E731
    for _ in range(2):
        np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(one)))(u, log_base, gain), direct, rtol=1e-13)
    for at in np.ndindex(2, 3):
        np.testing.assert_allclose(one(u[at], log_base[at], gain[at]), direct[at], rtol=1e-13)
    # Constants inside a trace.
    np.testing.assert_allclose(jax.jit(lambda g: one(u, log_base, g))(gain), direct, rtol=1e-13)


def test_the_threshold_is_an_expectile():
    log_base, u = random(5, 30)
    for gain in (0.0, 1.0, 4.0):
        m = shaping.optimal_threshold(u, log_base, gain=gain)

        def loss(x, gain=gain):
            return (jnp.exp(log_base) * shaping.expectile_loss(jnp.full_like(u, x), u, gain=gain)).sum()

        assert abs(jax.grad(loss)(m)) < 1e-14
        grid = jnp.linspace(u.min(), u.max(), 2001)
        nearest = grid[jax.vmap(loss)(grid).argmin()]
        assert abs(nearest - m) <= grid[1] - grid[0]


def test_stackelberg_T3_f_falls_with_slopes_between_its_two_weights_and_is_convex():
    for seed in range(10):
        log_base, u = random(seed, 20)
        gain = 0.5 * (1 + seed % 5)
        grid = np.linspace(u.min() - 1, u.max() + 1, 400)
        f = np.exp(gain) * scaled_f(grid, u, log_base, gain)
        slopes = np.diff(f) / np.diff(grid)
        assert slopes.min() >= -np.exp(gain) * (1 + 1e-9)
        assert slopes.max() <= -1 + 1e-9
        assert (np.diff(slopes) >= -1e-8).all()
        m = float(shaping.optimal_threshold(u, log_base, gain=gain))
        assert (f[grid < m] > 0).all()
        assert (f[grid > m] < 0).all()


def test_stackelberg_T3_monotone_in_the_gain_from_the_mean_to_the_maximum():
    log_base, u = random(6, 50, 12)
    path = shaping.optimal_threshold(u, log_base, gain=np.linspace(0, 40, 81)[:, None])
    assert (jnp.diff(path, axis=0) >= -1e-14).all()
    np.testing.assert_allclose(path[0], (jnp.exp(log_base) * u).sum(-1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(path[-1], u.max(-1), atol=1e-10)


def test_stackelberg_T3_equivariance_order_and_weights_as_repeats():
    log_base, u = random(7, 12)
    for gain in (0.7, 5.0, 90.0):
        find = functools.partial(shaping.optimal_threshold, gain=gain)
        m = find(u, log_base)
        for scale, shift in ((3.0, -7.0), (1e-6, 2.0), (1e8, 0.0)):
            np.testing.assert_allclose(find(scale * u + shift, log_base), scale * m + shift, rtol=1e-12)
        order = np.random.default_rng(0).permutation(12)
        np.testing.assert_allclose(find(u[order], log_base[order]), m, rtol=1e-13)
        np.testing.assert_allclose(find(u, log_base + 5.0), m, rtol=1e-13)
        counts = np.array([1, 3, 2, 5])
        repeated = find(jnp.repeat(u[:4], counts))
        np.testing.assert_allclose(find(u[:4], jnp.log(counts)), repeated, rtol=1e-13)
        np.testing.assert_allclose(find(jnp.repeat(u, 3)), find(u), rtol=1e-13)


def test_max_gain_caps_explicitly():
    log_base, u = random(8, 3, 6)
    gain = jnp.array([0.5, 2.0, 50.0])
    capped = shaping.optimal_threshold(u, log_base, gain=gain, max_gain=2.0)
    np.testing.assert_array_equal(capped, shaping.optimal_threshold(u, log_base, gain=jnp.minimum(gain, 2.0)))
    assert capped[2] < shaping.optimal_threshold(u, log_base, gain=gain)[2]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [0.0, 0.3, -1e5])
def test_identical_utilities_are_their_own_threshold_and_get_no_reward(value, dtype):
    u = jnp.full((7,), value, dtype)
    for gain in (0.0, 1.0, 1e4):
        find = lambda u, g: shaping.optimal_threshold(u, gain=g)  # noqa: E731
        assert find(u, gain) == u[0]
        assert (shaping.threshold_reward(u, find(u, gain), bound=2.0) == 0).all()
        assert all(np.isfinite(g).all() for g in jax.grad(find, argnums=(0, 1))(u, jnp.asarray(gain, dtype)))
    assert shaping.optimal_threshold(u[:1], gain=3.0) == u[0]


def exact_kl_bound(gain: float) -> float:
    """z − 1 − ln z with 60 digits."""
    with decimal.localcontext(prec=60):
        g = decimal.Decimal(gain)
        z = g / (1 - (-g).exp())
        return float(z - 1 - z.ln())


def test_stackelberg_T4_no_reward_in_the_box_exceeds_the_kl_bound():
    log_base, u = random(9, 5000, 8)
    rng = np.random.default_rng(1)
    log_base = jax.nn.log_softmax(log_base * rng.uniform(0, 6, (5000, 1)))
    gain = rng.uniform(0.01, 12, 5000)
    inside = gain[:, None] * rng.uniform(size=u.shape)
    corner = gain[:, None] * (rng.uniform(size=u.shape) < 0.4)
    threshold = shaping.threshold_reward(u, shaping.optimal_threshold(u, log_base, gain=gain), bound=gain)
    for reward in (inside, corner, threshold):
        share = gibbs.kl(gibbs.log_policy(log_base, reward, beta=1.0), log_base) / shaping.kl_bound(gain)
        assert share.max() <= 1 + 1e-9
    assert share.max() > 0.99


def test_stackelberg_T4_literal_numbers_and_where_the_bound_is_attained():
    gains = jnp.array([1.0, 2.0, 3.0, 5.0, 10.0])
    np.testing.assert_allclose(shaping.kl_bound(gains), [0.1233, 0.4745, 1.0075, 2.418, 6.698], atol=5e-4)
    for gain in gains:
        q = (gain / -jnp.expm1(-gain) - 1) / jnp.expm1(gain)
        base = jnp.log(jnp.array([1 - q, q]))
        found = gibbs.kl(gibbs.log_policy(base, jnp.array([0.0, gain]), beta=1.0), base)
        np.testing.assert_allclose(found, shaping.kl_bound(gain), rtol=1e-12)
    grid = jnp.geomspace(1e-4, 1e4, 200)
    assert (shaping.kl_bound(grid) <= jnp.minimum(grid, grid**2 / 8)).all()


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float64", 1e-11)])
def test_stackelberg_T4_the_bound_keeps_its_digits_across_its_series(dtype, rtol):
    gains = np.r_[np.geomspace(1e-6, 1e4, 101), 0.1 + np.linspace(-1e-3, 1e-3, 21)].astype(dtype)
    np.testing.assert_allclose(shaping.kl_bound(gains), [exact_kl_bound(float(g)) for g in gains], rtol=rtol)
    slope = jax.vmap(jax.grad(shaping.kl_bound))(jnp.asarray(np.r_[0, gains].astype(dtype)))
    assert slope.dtype == dtype
    assert np.isfinite(slope).all()
    assert slope[0] == 0
    assert shaping.kl_bound(jnp.zeros((), dtype)) == 0
    # Of the slope, 1/L − 1/(e^L − 1) − ..., float64 differences have eight digits.
    middle = jnp.asarray(gains[30:70])
    wide = [(exact_kl_bound(g * (1 + 1e-5)) - exact_kl_bound(g * (1 - 1e-5))) / (2e-5 * g) for g in map(float, middle)]
    np.testing.assert_allclose(jax.vmap(jax.grad(shaping.kl_bound))(middle), wide, rtol=1e-4)


def soft_utility(u, log_base, gain, sharpness):
    m = shaping.optimal_threshold(u, log_base, gain=gain)
    return delivered(shaping.soft_threshold_reward(u, m, bound=gain, sharpness=sharpness), u, log_base)


def test_stackelberg_T5_the_soft_reward_runs_from_the_base_to_the_hard_threshold():
    log_base, u = random(10, 200, 8)
    best = shaping.optimal_threshold(u, log_base, gain=2.0)
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
    assert shaping.optimal_threshold(two, base, gain=0.1) < 1.6


def threshold_on_tree(seed: int, gain: float, dtype="float64"):
    """(log_ref [S,V], utility, base law, indicator of u > m [M], p(sz) [S,V])."""
    log_ref, u = (x.astype(dtype) for x in exact.tables(TREE, seed))
    base = tree.response_log_prob(TREE, log_ref)
    exceeds = shaping.threshold_reward(u, shaping.optimal_threshold(u, base, gain=gain), bound=np.ones((), dtype))
    p = tree.value(TREE, log_ref, exceeds)
    return log_ref, u, base, exceeds, jnp.clip(tree.q_values(TREE, p, exceeds), 0, 1)


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
    m = shaping.optimal_threshold(u, log_base, gain=gain)
    above = np.asarray(u > m)
    wanted = np.exp(gibbs.log_policy(log_base, gain * above, beta=1.0))
    for unnormalised in (log_base, log_base + 3.0):
        share, exceed, log_norm = shaping.mixture(u, unnormalised, m, gain=gain)
        np.testing.assert_allclose(exceed, base[above].sum(), rtol=1e-13)
        np.testing.assert_allclose((1 - share) * base + share * base * above / exceed, wanted, atol=1e-14)
        np.testing.assert_allclose(log_norm, np.log(1 + np.expm1(gain) * exceed), rtol=1e-12, atol=1e-15)
    kept = base * np.exp(shaping.accept_log_prob(u, m, gain=gain))
    np.testing.assert_allclose(kept / kept.sum(), wanted, atol=1e-14)
    np.testing.assert_allclose(np.log(kept.sum()), log_norm - gain, rtol=1e-12, atol=1e-14)


def test_mixture_of_samples_and_of_responses_none_or_all_of_which_exceed():
    u = jnp.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(shaping.mixture(u, None, 1.5, gain=2.0).exceed, 0.5)
    none, every = shaping.mixture(u, None, 9.0, gain=2.0), shaping.mixture(u, None, -1.0, gain=2.0)
    np.testing.assert_allclose([none.share, none.exceed, none.log_norm], 0, atol=1e-15)
    np.testing.assert_allclose([every.share, every.exceed, every.log_norm], [1 - np.exp(-2), 1, 2])


def test_stackelberg_T8_error_of_the_estimate_is_bounded_and_its_loss_is_of_second_order():
    for seed in range(60):
        log_base, u = random(seed, 40)
        gain = (0.5, 2.0, 4.0)[seed % 3]
        sample = np.random.default_rng(seed).choice(u, 15, p=np.exp(log_base))
        true = float(shaping.optimal_threshold(u, log_base, gain=gain))
        found = float(shaping.optimal_threshold(sample, gain=gain))
        # The difference is piecewise linear: its supremum is at a utility.
        gap = scaled_f(u, sample, np.zeros(15), gain) - scaled_f(u, u, log_base, gain)
        assert abs(found - true) <= np.exp(gain) * np.abs(gap).max() + 1e-12
        loss = true - delivered(shaping.threshold_reward(u, found, bound=gain), u, log_base)
        z = np.exp(shaping.mixture(u, log_base, found, gain=gain).log_norm)
        low, high = min(found, true), max(found, true)
        between = np.exp(log_base)[(u >= low) & (u <= high)].sum()
        assert -1e-12 <= loss <= np.expm1(gain) / z * (high - low) * between + 1e-12


def test_stackelberg_T9_at_equal_kl_the_tilt_is_never_behind_the_threshold():
    log_base, u = random(14, 400, 50)
    gain = jnp.tile(jnp.array([0.5, 1.0, 2.0, 3.0]), 100)
    m = shaping.optimal_threshold(u, log_base, gain=gain)
    reward = shaping.threshold_reward(u, m, bound=gain)
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
    free = shaping.minmax(u, u, bound=1e3, range_factor=1.01)
    np.testing.assert_allclose(free - 1.01 * u, (free - 1.01 * u)[:, :1] * jnp.ones(10), atol=1e-12)
    np.testing.assert_allclose(
        gibbs.log_policy(log_base, free, beta=0.7), gibbs.log_policy(log_base, 1.01 * u, beta=0.7), atol=1e-12
    )
    bound = shaping.minmax(u, u, bound=0.5, range_factor=1.01)
    np.testing.assert_allclose(bound.max(-1) - bound.min(-1), 0.5, rtol=1e-12)
    gap = gibbs.log_policy(log_base, bound, beta=0.7) - gibbs.log_policy(log_base, 1.01 * u, beta=0.7)
    assert (jnp.abs(gap).max(-1) > 0.1).all()


U, REFERENCE = np.array([-1.0, 1.0, 5.0]), np.array([0.0, 2.0, 4.0, 2.0])
BASELINES = {
    "raw": (shaping.raw, [-1, 1, 5]),
    "minmax": (functools.partial(shaping.minmax, bound=2.0), [-0.5, 0.5, 2.5]),
    "minmax, binding": (functools.partial(shaping.minmax, bound=2.0, range_factor=1.5), [-0.5, 0.5, 2.5]),
    "minmax, free": (functools.partial(shaping.minmax, bound=9.0, range_factor=1.5), [-1.5, 1.5, 7.5]),
    "meanstd": (shaping.meanstd, np.array([-3, -1, 3]) / np.sqrt(2)),
    "cap": (functools.partial(shaping.cap, bound=3.0), [0, 1, 3]),
    "mean_sigmoid": (
        functools.partial(shaping.mean_sigmoid, bound=2.0, sharpness=0.5),
        2 / (1 + np.exp([1.5, 0.5, -1.5])),
    ),
    "log_sigmoid": (functools.partial(shaping.log_sigmoid, quantile=0.5), -np.log1p(np.exp([3, 1, -3]))),
    "preference": (
        shaping.preference_as_reward,
        [np.mean(1 / (1 + np.exp(REFERENCE - x))) for x in U],
    ),
    # m of (0, 2, 2, 4) at gain ln 3: (0 + 2 + 2 + 3·4)/(1 + 1 + 1 + 3) = 8/3.
    "stackelberg": (functools.partial(shaping.stackelberg, bound=np.log(9), beta=2.0), [0, 0, np.log(9)]),
    "stackelberg, soft": (
        functools.partial(shaping.stackelberg, bound=np.log(9), beta=2.0, sharpness=3.0),
        np.log(9) / (1 + np.exp(8 - 3 * U)),
    ),
    "stackelberg, capped": (
        functools.partial(shaping.stackelberg, bound=np.log(9), beta=0.1, sharpness=3.0, max_gain=np.log(3)),
        np.log(9) / (1 + np.exp(8 - 3 * U)),
    ),
    "stackelberg, range": (
        functools.partial(shaping.stackelberg, bound=50.0, beta=2 / np.log(3), sharpness=3.0, range_factor=0.5),
        2 / (1 + np.exp(8 - 3 * U)),
    ),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_by_hand(name):
    shape, expected = BASELINES[name]
    np.testing.assert_allclose(shape(U, REFERENCE), expected, rtol=1e-12, atol=1e-14)
    # Two prompts, in float32.
    rows = [np.stack([x, x]).astype(np.float32) for x in (U, REFERENCE)]
    np.testing.assert_allclose(jax.jit(shape)(*rows), [expected] * 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_finite_where_all_samples_are_the_same(name):
    with jax.enable_x64(False):
        for value in (0.0, 0.3, 7e4):
            reference = np.full((2, 10), value, np.float32)
            reward = BASELINES[name][0](reference[:, :3], reference)
            assert reward.dtype == "float32"
            assert np.isfinite(reward).all()
            assert (reward == reward[0, 0]).all()
            assert np.isfinite(BASELINES[name][0](reference[:, :3] + 1, reference)).all()


def test_bounds_may_differ_over_prompts():
    u, reference = np.tile(U, (2, 1)), np.tile(REFERENCE, (2, 1))
    bound = np.array([1.0, 3.0])
    for shape in (
        shaping.cap,
        shaping.minmax,
        functools.partial(shaping.minmax, range_factor=0.5),
        functools.partial(shaping.mean_sigmoid, sharpness=1.0),
        functools.partial(shaping.stackelberg, beta=1.0),
        functools.partial(shaping.stackelberg, beta=1.0, range_factor=0.5),
    ):
        each = [shape(u[i], reference[i], bound=bound[i]) for i in range(2)]
        np.testing.assert_allclose(shape(u, reference, bound=bound), each)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("utility: expected finite", lambda: shaping.optimal_threshold(jnp.array([0.0, jnp.nan]), gain=1.0)),
        ("utility: expected finite", lambda: shaping.optimal_threshold(jnp.array([0.0, -jnp.inf]), gain=1.0)),
        ("utility: expected at least one", lambda: shaping.optimal_threshold(jnp.zeros((3, 0)), gain=1.0)),
        ("utility: expected at least one", lambda: shaping.optimal_threshold(1.0, gain=1.0)),
        ("gain: expected", lambda: shaping.optimal_threshold(jnp.zeros(3), gain=-1.0)),
        ("gain: expected", lambda: shaping.optimal_threshold(jnp.zeros(3), gain=jnp.nan)),
        ("gain: expected", lambda: shaping.kl_bound(-0.1)),
        ("log_base: expected a resp", lambda: shaping.optimal_threshold(jnp.zeros(2), jnp.full(2, -jnp.inf), gain=1.0)),
        ("log_base: expected log", lambda: shaping.optimal_threshold(jnp.zeros(2), jnp.array([0, jnp.nan]), gain=1.0)),
        ("log_base: expected log", lambda: shaping.optimal_threshold(jnp.zeros(2), jnp.array([0, jnp.inf]), gain=1.0)),
        ("bound: expected", lambda: shaping.threshold_reward(jnp.zeros(3), 0.0, bound=0.0)),
        ("bound: expected", lambda: shaping.soft_threshold_reward(jnp.zeros(3), 0.0, bound=-1.0, sharpness=1.0)),
        ("beta: expected", lambda: shaping.exceedance_soft_value(0.5, bound=1.0, beta=0.0)),
    ],
)
def test_bad_input_is_named(field, call):
    with pytest.raises(ValueError, match=field):
        call()


@pytest.mark.parametrize(
    ("utility", "log_base", "gain"),
    [
        ([0.0, np.nan, 1.0], [0.0, 0.0, 0.0], 1.0),
        ([0.0, -np.inf, 1.0], [0.0, 0.0, 0.0], 1.0),
        ([0.0, np.inf, 1.0], [0.0, 0.0, 0.0], 1.0),
        ([0.0, 1.0, 1.0], [-np.inf, -np.inf, -np.inf], 1.0),
        ([0.0, 1.0, 1.0], [0.0, np.nan, 0.0], 1.0),
        ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], -1.0),
        ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], np.nan),
    ],
)
def test_bad_input_is_nan_under_jit_and_only_in_its_row(utility, log_base, gain):
    find = jax.jit(lambda u, w, g: shaping.optimal_threshold(u, w, gain=g))
    good = ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], 1.0)
    found = find(*(jnp.asarray(pair, jnp.float32) for pair in zip(good, (utility, log_base, gain), strict=True)))
    assert np.isfinite(found[0])
    assert np.isnan(found[1])
    assert np.isnan(jax.jit(shaping.kl_bound)(-1.0))

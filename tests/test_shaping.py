"""Stackelberg shaping in closed form: its exact properties, T1 to T4."""

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


@jax.jit
def delivered(reward, utility, log_base, *, beta=1.0):
    return gibbs.utility(gibbs.log_policy(log_base, reward, beta=beta), utility)


@jax.jit
def answer(utility, log_base, gain):
    """log pi* of the threshold reward, beta 1."""
    m = shaping.optimal_threshold(utility, log_base=log_base, gain=gain)
    return gibbs.log_policy(log_base, shaping.threshold_reward(utility, threshold=m, bound=gain), beta=1.0)


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
        np.testing.assert_allclose(shaping.leader_utility(log_base, reward, utility=u, beta=1.0), value, atol=5e-5)
    for bound, value in ((1.0, 1.2320), (2.0, 1.4509), (3.0, 1.6906), (5.0, 1.9428)):
        m = shaping.optimal_threshold(u, log_base=log_base, gain=bound)
        np.testing.assert_allclose(m, value, atol=5e-5)
        np.testing.assert_array_equal(shaping.threshold_reward(u, threshold=m, bound=bound), [0, bound])
    # At B = 1, the range, the raw reward less its minimum is the threshold reward.
    np.testing.assert_allclose(
        delivered(u, u, log_base), shaping.optimal_threshold(u, log_base=log_base, gain=1.0), rtol=1e-14
    )


@pytest.mark.parametrize("n", range(1, 11))
def test_stackelberg_T2_no_assignment_and_no_interior_reward_beats_the_threshold(n):
    log_base, u = random(n, 8, n)
    corners = np.array(list(itertools.product([0.0, 1.0], repeat=n)))
    inside = np.random.default_rng(100 + n).uniform(size=(200, n))
    for gain in (0.3, 2.0, 8.0):
        best = shaping.optimal_threshold(u, log_base=log_base, gain=gain)
        reward = shaping.threshold_reward(u, threshold=best, bound=gain)
        np.testing.assert_allclose(delivered(reward, u, log_base), best, atol=1e-12)
        others = [np.asarray(delivered(gain * r[:, None], u, log_base)).max(axis=0) for r in (corners, inside)]
        assert (others[0] <= best + 1e-12).all()
        assert (others[1] <= best + 1e-12).all()
        np.testing.assert_allclose(others[0], best, atol=1e-12)


def test_stackelberg_T2_ties_share_a_fate_and_what_sits_on_the_threshold_does_not_matter():
    log_base, u = random(0, 6)
    u = u.at[3].set(u[1])
    m = shaping.optimal_threshold(u, log_base=log_base, gain=2.0)
    merged = jnp.logaddexp(log_base[1], log_base[3])
    alone = jnp.delete(log_base, 3).at[1].set(merged)
    np.testing.assert_allclose(m, shaping.optimal_threshold(jnp.delete(u, 3), log_base=alone, gain=2.0), rtol=1e-14)
    # One more response, with a utility of exactly m*: the optimum stays, whatever it is paid.
    u, log_base = jnp.append(u, m), jnp.append(log_base + jnp.log(0.6), jnp.log(0.4))
    np.testing.assert_allclose(shaping.optimal_threshold(u, log_base=log_base, gain=2.0), m, rtol=1e-14)
    for paid in (0.0, 0.7, 2.0):
        reward = shaping.threshold_reward(u, threshold=m, bound=2.0).at[-1].set(paid)
        np.testing.assert_allclose(delivered(reward, u, log_base), m, rtol=1e-13)


def test_stackelberg_T2_newton_is_the_sorted_prefix_form_and_bisection():
    for seed in range(40):
        n = (1, 2, 3, 17, 60)[seed % 5]
        log_base, u = random(seed, n)
        log_base = 4 * log_base
        for gain in (0.0, 1e-3, 0.5, 3.0, 12.0, 40.0, 300.0):
            found = shaping.optimal_threshold(u, log_base=log_base, gain=gain)
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
    found = shaping.optimal_threshold(jnp.asarray(u), log_base=jnp.asarray(log_base), gain=np.float32(gain))
    assert found.dtype == "float32"
    expected = [sorted_prefix(x, w, np.float64(np.float32(gain))) for x, w in zip(u, log_base, strict=True)]
    scale = np.maximum(spread, np.abs(u).max(axis=-1))
    # e^gain magnifies the rounding of the gain and of the log weights, 4e-6 each near 86.
    np.testing.assert_allclose((found - np.array(expected)) / scale, 0, atol=1e-5)
    if gain:
        # The reward must still pay the best where the threshold rounds to it.
        reward = shaping.threshold_reward(u, threshold=found, bound=np.float32(gain))
        got = gibbs.utility(gibbs.log_policy(log_base, reward, beta=np.float32(1)), u)
        np.testing.assert_allclose((got - found) / scale, 0, atol=3e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("top", [0.0, 1.0, -3.0, 1e-30, 1e30])
def test_at_large_gains_the_best_response_alone_is_rewarded(dtype, top):
    u = jnp.asarray(top + np.array([-1.0, -2.0, 0.0, -5.0]) * max(abs(top), 1), dtype)
    for gain in (40.0, 1e4):
        m = shaping.optimal_threshold(u, gain=gain)
        np.testing.assert_array_equal(shaping.threshold_reward(u, threshold=m, bound=gain), [0, 0, gain, 0])


def test_weights_too_small_to_count_are_absent_whatever_their_utility():
    log_base = jnp.array([0.0, -1.0, -200.0, -jnp.inf, -1e20], jnp.float32)
    u = jnp.array([0.0, 1.0, 1e6, jnp.nan, jnp.inf], jnp.float32)
    for gain in (0.0, 3.0, 1e3):
        expected = shaping.optimal_threshold(u[:2], log_base=log_base[:2], gain=gain)
        for utility in (u, u.at[2].set(jnp.nan)):

            def find(u, log_base=None, gain=gain):
                return shaping.optimal_threshold(u, log_base=log_base, gain=gain)

            np.testing.assert_allclose(find(utility, log_base), expected, rtol=1e-6)
            gradient = jax.grad(find, argnums=(0, 1))(utility, log_base)
            assert all(np.isfinite(g).all() for g in gradient)
            assert all((g[2:] == 0).all() for g in gradient)


def test_stackelberg_T2_gradients_by_differences_and_by_the_implicit_function():
    log_base, u = random(3, 4, 9)
    gain = jnp.array([0.2, 1.0, 3.0, 6.0])
    find = lambda u, w, g: shaping.optimal_threshold(u, log_base=w, gain=g)  # noqa: E731
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
    found = jax.grad(lambda u, w, g: shaping.optimal_threshold(u, log_base=w, gain=g), argnums=(0, 1, 2))(
        u, log_base, jnp.float32(1e4)
    )
    assert all(g.dtype == "float32" for g in found)
    np.testing.assert_allclose(found[0], [0, 0, 0.75, 0.25], rtol=1e-5)
    np.testing.assert_allclose(found[1], 0, atol=1e-5)
    np.testing.assert_allclose(found[2], 0, atol=1e-5)


def test_threshold_under_vmap_and_jit_and_per_prompt_gains():
    log_base, u = random(4, 2, 3, 11)
    gain = jnp.arange(6.0).reshape(2, 3)
    direct = shaping.optimal_threshold(u, log_base=log_base, gain=gain)
    one = lambda u, w, g: shaping.optimal_threshold(u, log_base=w, gain=g)  # noqa: E731
    for _ in range(2):
        np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(one)))(u, log_base, gain), direct, rtol=1e-13)
    for at in np.ndindex(2, 3):
        np.testing.assert_allclose(one(u[at], log_base[at], gain[at]), direct[at], rtol=1e-13)
    # Constants inside a trace.
    np.testing.assert_allclose(jax.jit(lambda g: one(u, log_base, g))(gain), direct, rtol=1e-13)


def test_the_threshold_is_an_expectile():
    log_base, u = random(5, 30)
    for gain in (0.0, 1.0, 4.0):
        m = shaping.optimal_threshold(u, log_base=log_base, gain=gain)

        def loss(x, gain=gain):
            return (jnp.exp(log_base) * shaping.expectile_loss(jnp.full_like(u, x), utility=u, gain=gain)).sum()

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
        m = float(shaping.optimal_threshold(u, log_base=log_base, gain=gain))
        assert (f[grid < m] > 0).all()
        assert (f[grid > m] < 0).all()


def test_stackelberg_T3_monotone_in_the_gain_from_the_mean_to_the_maximum():
    log_base, u = random(6, 50, 12)
    path = shaping.optimal_threshold(u, log_base=log_base, gain=np.linspace(0, 40, 81)[:, None])
    assert (jnp.diff(path, axis=0) >= -1e-14).all()
    np.testing.assert_allclose(path[0], (jnp.exp(log_base) * u).sum(-1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(path[-1], u.max(-1), atol=1e-10)


def test_stackelberg_T3_equivariance_order_and_weights_as_repeats():
    log_base, u = random(7, 12)
    for gain in (0.7, 5.0, 90.0):

        def find(u, log_base=None, gain=gain):
            return shaping.optimal_threshold(u, log_base=log_base, gain=gain)

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
    capped = shaping.optimal_threshold(u, log_base=log_base, gain=gain, max_gain=2.0)
    np.testing.assert_array_equal(capped, shaping.optimal_threshold(u, log_base=log_base, gain=jnp.minimum(gain, 2.0)))
    assert capped[2] < shaping.optimal_threshold(u, log_base=log_base, gain=gain)[2]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [0.0, 0.3, -1e5])
def test_identical_utilities_are_their_own_threshold_and_get_no_reward(value, dtype):
    u = jnp.full((7,), value, dtype)
    for gain in (0.0, 1.0, 1e4):
        find = lambda u, g: shaping.optimal_threshold(u, gain=g)  # noqa: E731
        assert find(u, gain) == u[0]
        assert (shaping.threshold_reward(u, threshold=find(u, gain), bound=2.0) == 0).all()
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
    threshold = shaping.threshold_reward(
        u, threshold=shaping.optimal_threshold(u, log_base=log_base, gain=gain), bound=gain
    )
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

"""The leader's optimum where beta is unknown, under a budget of KL and for groups, with numbers and derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import gibbs, infalign, shaping

E_BASE, E_UTILITY = np.log([0.9, 0.1]), np.array([1.0, 2.0])
BASE, UTILITY = np.log([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, 4.0])
GROUP_BASE, GROUPS = np.log([0.5, 0.3, 0.2]), np.array([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def random(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """(log base, utility)."""
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.ones(shape[-1]), shape[:-1])), rng.normal(size=shape)


def test_the_robust_threshold_delivers_the_least_at_the_highest_beta_exactly():
    for beta, value in ((1.0, 1.690568), (3.0, 1.231969)):
        found = shaping.robust_threshold(E_UTILITY, log_base=E_BASE, bound=3.0, beta_high=beta)
        np.testing.assert_allclose(found, value, atol=1e-6)
    log_base, utility = random(0, 7)
    threshold = shaping.robust_threshold(utility, log_base=log_base, bound=2.0, beta_high=3.0, beta_low=0.5)
    reward = shaping.threshold_reward(utility, threshold=threshold, bound=2.0)
    betas = np.linspace(0.5, 3.0, 31)
    delivered = jax.vmap(lambda b: shaping.leader_utility(log_base, reward, utility=utility, beta=b))(betas)
    assert delivered.argmin() == 30
    np.testing.assert_allclose(delivered.min(), threshold, rtol=1e-12)
    with pytest.raises(ValueError, match=r"beta_high: expected at least beta_low = 2"):
        shaping.robust_threshold(utility, bound=1.0, beta_high=1.0, beta_low=2.0)


def test_over_a_prior_of_betas_the_gradient_is_the_mean_and_a_climb_leaves_the_best_threshold():
    betas, prior = np.array([0.2, 1.0, 5.0]), np.array([0.3, 0.3, 0.4])
    log_base, utility = random(1, 40, 6)

    def expected(reward):
        each = [shaping.leader_utility(log_base, reward, utility=utility, beta=b) for b in betas]
        return sum(q * u for q, u in zip(prior, each, strict=True))

    found = jax.jit(
        lambda: shaping.solve_leader(log_base, utility=utility, bound=2.0, beta=betas, prior=prior, steps=400)
    )()
    thresholds = 2.0 * (utility >= np.moveaxis(utility, -1, 0)[..., None])
    best = jax.vmap(expected)(thresholds).max(axis=0)
    gain = expected(found.reward) - best
    assert gain.min() > -1e-9
    assert 0.3 < (gain > 1e-6).mean() < 0.9  # short of the best reward, and where a threshold is best
    np.testing.assert_allclose(found.objective, expected(found.reward).mean(), rtol=1e-12)
    slope = jax.grad(lambda r: expected(r).sum())(found.reward)
    laws = [np.exp(gibbs.log_policy(log_base, found.reward, beta=b)) for b in betas]
    mean = sum(
        q * p * (utility - (p * utility).sum(axis=-1, keepdims=True)) / b
        for q, p, b in zip(prior, laws, betas, strict=True)
    )
    np.testing.assert_allclose(slope, mean, atol=1e-12)
    for bad in (np.array([0.5, 0.5]), np.array([0.5, 0.5, 0.5])):
        with pytest.raises(ValueError, match="prior: expected"):
            shaping.solve_leader(log_base, utility=utility, bound=2.0, beta=betas, prior=bad)


def paid(kl, utility=UTILITY, log_base=BASE, bound=2.0, beta=1.0):
    return shaping.budget_reward(utility, log_base=log_base, bound=bound, beta=beta, kl=kl)


def delivered(kl, utility=UTILITY, log_base=BASE, bound=2.0, beta=1.0):
    reward = paid(kl, utility, log_base, bound, beta).reward
    return shaping.leader_utility(log_base, reward, utility=utility, beta=beta)


def test_within_a_budget_the_reward_is_raw_then_both_then_the_threshold_s():
    budgets = jnp.array([0.1, 0.2, 0.3, 0.5])
    found = jax.jit(paid)(budgets)
    np.testing.assert_allclose(found.multiplier, (3.1048, 2.2692, 1.5143, 0.0), atol=1e-4)
    np.testing.assert_allclose(delivered(budgets), (1.686260, 1.948008, 2.146254, 2.230527), atol=1e-6)
    kl = gibbs.kl(gibbs.log_policy(BASE, found.reward, beta=1.0), BASE)
    np.testing.assert_allclose(kl, (0.1, 0.2, 0.3, 0.407677), atol=1e-6)
    assert ((found.reward >= 0) & (found.reward <= 2)).all()
    np.testing.assert_allclose(found.reward[0], UTILITY / found.multiplier[0], rtol=1e-9)


def test_the_slope_in_the_budget_is_the_multiplier_in_both_modes_and_prompt_by_prompt():
    budgets = jnp.array([0.1, 0.2, 0.3, 0.5])
    slope = jax.jit(jax.vmap(jax.grad(delivered)))(budgets)
    np.testing.assert_allclose(slope, paid(budgets).multiplier, atol=1e-9)
    log_base, utility = random(2, 5, 6)
    bound, beta, kl = np.linspace(0.5, 3, 5), np.linspace(0.4, 2, 5), np.array([0.02, 0.05, 0.1, 0.2, 0.4])
    whole = jax.jit(delivered)(kl, utility, log_base, bound, beta)
    np.testing.assert_allclose(jax.vmap(delivered)(kl, utility, log_base, bound, beta), whole, rtol=1e-12)

    def value(*x):
        return (delivered(*x) * np.cos(np.arange(5))).sum()

    at = tuple(map(jnp.asarray, (kl, utility, log_base, bound, beta)))
    draw = np.random.default_rng(3)
    along = tuple(jnp.asarray(draw.normal(size=x.shape)) for x in at)
    both = jax.value_and_grad(value, argnums=tuple(range(5)))
    pushed = jax.jit(lambda *x: jax.jvp(both, x, along))  # one program for all of them
    gradient = lambda *x: pushed(*x)[0][1]  # noqa: E731
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    moved = lambda s: tuple(x + s * d for x, d in zip(at, along, strict=True))  # noqa: E731
    h = 1e-5
    first = dot(gradient(*at), along)
    np.testing.assert_allclose(first, (pushed(*moved(h))[0][0] - pushed(*moved(-h))[0][0]) / (2 * h), rtol=1e-5)
    np.testing.assert_allclose(pushed(*at)[1][0], first, rtol=1e-9)
    second = (dot(gradient(*moved(h)), along) - dot(gradient(*moved(-h)), along)) / (2 * h)
    found = dot(pushed(*at)[1][1], along)
    np.testing.assert_allclose(found, second, rtol=1e-4)


def test_no_reward_within_the_budget_delivers_more():
    """Against projected gradients with the budget as a penalty above its price."""
    log_base, utility = random(4, 6)
    kl, price = 0.15, float(paid(0.15, utility, log_base).multiplier)
    penalised = lambda r: (  # noqa: E731
        shaping.leader_utility(log_base, r, utility=utility, beta=1.0)
        - 3 * price * shaping.excess_kl(log_base, r, beta=1.0, budget=kl)
    )
    climbed = jax.jit(
        lambda: shaping.solve_leader(
            log_base, utility=utility, bound=2.0, beta=1.0, objective=penalised, steps=3000, step_size=0.01
        )
    )()
    best = float(delivered(kl, utility, log_base))
    assert best - 1e-3 < climbed.objective < best + 1e-9


def test_budgets_at_their_edges():
    for name in ("kl", "bound", "beta"):
        with pytest.raises(ValueError, match=f"{name}: expected a value > 0"):
            paid(**({"kl": 0.1} | {name: 0.0}))
    assert np.isnan(jax.jit(paid)(-0.1).reward).all()
    alike = paid(0.1, np.ones(4))
    np.testing.assert_array_equal(alike.reward, 0)
    np.testing.assert_array_equal(alike.multiplier, 0)
    lost = paid(0.1, np.append(UTILITY, 99.0), np.append(BASE, -np.inf))
    np.testing.assert_allclose(lost.reward[:4], paid(0.1).reward, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(paid)(jnp.float32(0.2)).multiplier, 2.2692, rtol=1e-3)


def test_groups_are_paid_by_the_linear_program():
    found = shaping.worst_group(GROUPS, log_base=GROUP_BASE, gain=1.5)
    np.testing.assert_allclose(found.utility, 1.176386, atol=1e-6)
    np.testing.assert_allclose(found.log_weight, (0.989174, 0, 1.5), atol=1e-6)
    np.testing.assert_allclose(found.multipliers, (0.411807, 0.588193), atol=1e-6)
    np.testing.assert_allclose(np.exp(GROUP_BASE) @ GROUPS.T, (0.9, 1.3), atol=1e-12)


def test_groups_prompt_by_prompt_have_the_dual_s_value_and_derivatives_to_second_order():
    """Weak duality: no multipliers give less than the value, those found give it; the reward is the mixture's."""
    log_base, utility = random(5, 4, 8)[0], np.random.default_rng(6).normal(size=(3, 4, 8))
    gain = np.array([0.3, 1.0, 2.0, 5.0])
    solve = jax.jit(lambda u, l, g: shaping.worst_group(u, log_base=l, gain=g))
    found = solve(utility, log_base, gain)
    each = shaping.leader_utility(log_base, found.log_weight, utility=utility, beta=1.0)
    np.testing.assert_allclose(each.min(axis=0), found.utility, atol=1e-9)
    np.testing.assert_allclose(found.multipliers.sum(axis=0), 1, atol=1e-9)
    mixed = lambda lam: (  # noqa: E731
        shaping.optimal_threshold((lam[..., None] * utility).sum(axis=0), log_base=log_base, gain=gain)
    )
    np.testing.assert_allclose(mixed(np.asarray(found.multipliers)), found.utility, atol=1e-9)
    others = np.random.default_rng(7).dirichlet(np.ones(3), (50, 4)).swapaxes(1, 2)
    assert all((mixed(lam) >= found.utility - 1e-9).all() for lam in others)
    assert (((found.log_weight > 1e-9) & (found.log_weight < gain[:, None] - 1e-9)).sum(axis=-1) <= 2).all()

    value = lambda u, l, g: (solve(u, l, g).utility * np.cos(np.arange(4))).sum()  # noqa: E731
    at = tuple(map(jnp.asarray, (utility, log_base, gain)))
    draw = np.random.default_rng(8)
    along = tuple(jnp.asarray(draw.normal(size=x.shape)) for x in at)
    both = jax.value_and_grad(value, argnums=(0, 1, 2))
    pushed = jax.jit(lambda *x: jax.jvp(both, x, along))  # one program for all of them
    gradient = lambda *x: pushed(*x)[0][1]  # noqa: E731
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    moved = lambda s: tuple(x + s * d for x, d in zip(at, along, strict=True))  # noqa: E731
    h = 1e-5
    first = dot(gradient(*at), along)
    np.testing.assert_allclose(first, (pushed(*moved(h))[0][0] - pushed(*moved(-h))[0][0]) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(pushed(*at)[1][0], first, rtol=1e-9)
    second = (dot(gradient(*moved(h)), along) - dot(gradient(*moved(-h)), along)) / (2 * h)
    np.testing.assert_allclose(dot(pushed(*at)[1][1], along), second, rtol=1e-5)
    law = jnp.exp(gibbs.log_policy(log_base, found.log_weight, beta=1.0))
    envelope = found.multipliers[..., None] * law * np.cos(np.arange(4))[:, None]
    np.testing.assert_allclose(gradient(*at)[0], envelope, atol=1e-9)


@pytest.mark.parametrize(
    ("utility", "base", "value"),
    [
        (np.zeros((2, 4)), [1, 1, 1, 1], 0.0),
        ([[1, 1, 2, 5], [3, 3, 0, 9]], [3, 3, 4, 0], 1.5),
        ([[2.0, 2, 2, 2], [4, 4, 4, 4]], [1, 1, 1, 1], 2.0),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [1, 1, 1, 1], None),
    ],
    ids=["constant", "ties and lost mass", "one group below", "groups that agree"],
)
def test_groups_at_ties_are_finite(utility, base, value):
    utility, base = np.asarray(utility, float), np.log(np.maximum(np.asarray(base, float), 1e-300))  # -690: absent
    found, slope = jax.jit(jax.value_and_grad(lambda u: shaping.worst_group(u, log_base=base, gain=1.0).utility))(
        jnp.asarray(utility)
    )
    expected = shaping.optimal_threshold(utility[0], log_base=base, gain=1.0) if value is None else value
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(slope.sum(), 1, atol=1e-6)
    reward = shaping.worst_group(utility, log_base=base, gain=1.0).log_weight
    if value == 0.0:
        np.testing.assert_allclose(reward, 0, atol=1e-6)


def test_groups_in_float32_are_near_and_bad_ones_are_named():
    log_base, utility = random(9, 4, 8)[0], np.random.default_rng(10).normal(size=(3, 4, 8))
    exact = shaping.worst_group(utility, log_base=log_base, gain=2.0)
    single = shaping.worst_group(
        *(jnp.asarray(utility, jnp.float32),), log_base=jnp.float32(log_base), gain=jnp.float32(2)
    )
    assert single.utility.dtype == jnp.float32
    np.testing.assert_allclose(single.utility, exact.utility, atol=1e-3)
    for message, bad in {
        "gain: expected a value > 0": {"utility": utility, "gain": 0.0},
        "gain: expected at most 30": {"utility": utility, "gain": 31.0},
        "utility: expected finite numbers": {"utility": utility + np.nan, "gain": 1.0},
        r"utility: expected \[G,...,n\]": {"utility": utility[0, 0], "gain": 1.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            shaping.worst_group(bad["utility"], gain=bad["gain"])


@pytest.mark.parametrize("fixed_point", [infalign.bon_fp, infalign.won_fp])
def test_optimal_transforms_have_reverse_mode(fixed_point):
    """Reverse, forward and differences agree in beta."""
    at = 0.8

    def value(beta):
        reward = fixed_point(2, beta=beta).reward
        return (reward * np.cos(np.arange(reward.shape[-1]) / 9)).sum()

    slope = jax.jit(jax.grad(value))(at)
    np.testing.assert_allclose(jax.jit(lambda x: jax.jvp(value, (x,), (1.0,))[1])(at), slope, rtol=1e-9)
    h = 1e-4
    np.testing.assert_allclose(slope, (value(at + h) - value(at - h)) / (2 * h), rtol=1e-5)

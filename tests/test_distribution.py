"""Laws of the reward from a prefix: two-hot rewards, values of laws, and their loss. D1 to D3, D5, D6, D8, D11."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import losses, shaping, tree
from jaxalign.critics import _reading, reads
from tests.reward_laws import (
    ATOMS,
    PREFIX,
    TREE,
    grid,
    laws,
    log_of,
    prefix_mean,
    read_at,
    two_hot,
    world,
)

grid_error = jax.jit(losses.grid_error)
UNEVEN = (-3.0, -1.7, -0.2, 0.1, 2.0)
BETAS = (0.05, 0.1, 0.25, 0.5, 1.0, 4.0, 50.0)


@pytest.fixture(autouse=True)
def _float64():
    """Identities hold in float64; tests of float32 say so."""
    with jax.enable_x64(True):
        yield


def test_two_hot_lies_on_two_neighbours_with_the_rewards_mean():
    reward = np.random.default_rng(0).uniform(-3, 2, size=(5, 40))
    law = two_hot(reward, UNEVEN)
    assert law.shape == (5, 40, 5)
    assert (law >= 0).all()
    np.testing.assert_allclose(law.sum(axis=-1), 1, atol=1e-15)
    np.testing.assert_allclose(law @ np.asarray(UNEVEN), reward, atol=1e-15)
    first = (law > 0).argmax(axis=-1)
    beside = np.asarray(UNEVEN)[first], np.asarray(UNEVEN)[np.minimum(first + 1, 4)]
    assert ((law > 0).sum(axis=-1) <= 2).all()
    assert ((beside[0] <= reward) & (reward <= beside[1])).all()


def test_two_hot_is_linear_inside_a_bin():
    share = np.linspace(0, 1, 11)
    for low, high in itertools.pairwise(UNEVEN):
        ends = two_hot([low, high], UNEVEN)
        between = two_hot((1 - share) * low + share * high, UNEVEN)
        np.testing.assert_allclose(between, np.outer(1 - share, ends[0]) + np.outer(share, ends[1]), atol=1e-14)


def test_two_hot_at_a_support_point_is_that_point_and_beyond_the_ends_the_end():
    np.testing.assert_array_equal(two_hot(UNEVEN, UNEVEN), np.eye(5))
    np.testing.assert_array_equal(two_hot([-7, 9], UNEVEN), np.eye(5)[[0, 4]])
    assert np.isnan(two_hot(np.nan, UNEVEN)).any()  # a reward that is no number stays one that is seen


def test_two_hot_at_a_double_point_is_left_of_it_and_above_it_right():
    support = (0.0, 1.0, 1.0, 2.0)
    np.testing.assert_allclose(
        two_hot([0.75, 1.0, 1.0 + 1e-9, 1.25], support),
        [[0.25, 0.75, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.75, 0.25]],
        atol=2e-9,
    )


def test_distribution_D1_the_mean_is_the_value_at_every_prefix():
    log_base, reward = world("A").log_base, world("A").reward
    exact = np.concatenate([tree.value(TREE, world("A").log_ref, reward), reward])
    assert exact[0] == pytest.approx(-0.220649, abs=1e-6)
    assert reward.max() == pytest.approx(1.984869, abs=1e-6)
    np.testing.assert_allclose(exact, prefix_mean(log_base, reward), atol=1e-14)
    for support in ((-3.0, 3.0), (*UNEVEN, 3.0), (reward.min(), 0.0, reward.max()), grid(25)):
        np.testing.assert_allclose(read_at(reads.mean(), laws("A", support), support), exact, atol=1e-12)


@pytest.mark.parametrize("support", [ATOMS, grid(25)])
def test_distribution_D1_laws_of_prefixes_mix_over_the_next_token(support):
    """The projected laws satisfy the linear equation exactly: no error of projection adds up along a response."""
    p = laws("A", support)
    mixed = (np.exp(world("A").log_ref)[..., None] * p[1:].reshape(40, 3, -1)).sum(axis=1)
    np.testing.assert_allclose(mixed, p[:40], atol=1e-12)


ROOTS = (
    (0.05, 1.81695, 1.83207, 1.82643),
    (0.1, 1.65516, 1.66860, 1.66188),
    (0.25, 1.24054, 1.25044, 1.24425),
    (0.5, 0.79578, 0.80332, 0.79803),
    (1.0, 0.37085, 0.37550, 0.37210),
    (4.0, -0.06855, -0.06730, -0.06823),
    (50.0, -0.20868, -0.20858, -0.20866),
)


def soft_values(beta: float) -> np.ndarray:
    """V_soft [121] of tree A by backward induction."""
    return np.concatenate([tree.soft_value(TREE, *world("A")[::2], beta=beta), world("A").reward])


@pytest.mark.parametrize(("beta", "exact", "coarse", "fine"), ROOTS)
def test_distribution_D2_soft_values_of_the_prompt(beta, exact, coarse, fine):
    found = [beta * read_at(reads.soft(), laws("A", grid(k))[:1], grid(k), beta=beta)[0] for k in (25, 49)]
    np.testing.assert_allclose([soft_values(beta)[0], *found], [exact, coarse, fine], atol=5.5e-6)


@pytest.mark.parametrize("count", [25, 49])
@pytest.mark.parametrize("beta", BETAS)
def test_distribution_D2_soft_values_err_upwards_within_the_bound_at_every_prefix(beta, count):
    step = 6 / (count - 1)
    value = beta * read_at(reads.soft(), laws("A", grid(count)), grid(count), beta=beta)
    excess = value - soft_values(beta)
    bound = beta * float(grid_error(step, beta=beta))
    assert (excess >= -1e-12).all()
    assert (excess <= bound + 1e-12).all()
    # Sharper, by the Gibbs mass of each bin; rewards at a support point have no error at all.
    tilted = world("A").log_base + world("A").reward / beta
    on_points = np.isclose(np.abs((world("A").reward + 3) / step % 1 - 0.5), 0.5, atol=1e-9)
    factor = np.where(on_points, 1, np.exp(bound / beta))
    assert (excess <= beta * np.log(prefix_mean(tilted - tilted.max(), factor)) + 1e-9).all()
    assert excess[0] > 1e-6  # the grid does err here: the bounds are not met by an exact value


def test_distribution_D2_a_beta_of_a_thousandth_of_the_range_is_finite_in_float32():
    p, support = laws("A", grid(25)), grid(25)
    exact = read_at(reads.soft(), p, support, beta=0.006)
    found = read_at(reads.soft(), p.astype(np.float32), support, beta=0.006)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-3)


THRESHOLDS = ((-1.0, 0.67466, 0.69220), (-0.3, 0.47735, 0.48150), (0.4, 0.35004, 0.34442), (1.1, 0.15268, 0.13994))


@pytest.mark.parametrize(("threshold", "exact", "head"), [*THRESHOLDS, (1.9, 0.03444, 0.03452)])
def test_distribution_D3_exceedance_of_the_prompt(threshold, exact, head):
    above = prefix_mean(world("A").log_base, 1.0 * (world("A").reward > threshold))[0]
    found = read_at(reads.exceedance(), laws("A", grid(97)), grid(97), threshold=threshold)[0]
    np.testing.assert_allclose([above, found], [exact, head], atol=5.5e-6)


@pytest.mark.parametrize("threshold", [-1.0, -0.3, 0.4, 1.1, 1.9, -2.2, 0.0, 0.71875, 1.5])
def test_distribution_D3_exceedance_errs_by_the_mass_near_the_threshold_at_every_prefix(threshold):
    log_base, reward = world("A").log_base, world("A").reward
    found = read_at(reads.exceedance(), laws("A", grid(97)), grid(97), threshold=threshold)
    error = np.abs(found - prefix_mean(log_base, 1.0 * (reward > threshold)))
    near = prefix_mean(log_base, 1.0 * (np.abs(reward - threshold) < 1.5 * 6 / 96))
    assert (error <= near + 1e-12).all()
    assert near[0] < 0.2


def test_exceedance_in_the_first_and_the_last_cell_is_that_of_rewards_that_end_there():
    """Rewards of an even law over the support: a grid's exceedance is exact between midpoints, and at the ends."""
    rewards = np.linspace(-3, 3, 60_001)
    p = two_hot(rewards, grid(7)).mean(axis=0)[None]
    for threshold in (-4.0, -3.0, -2.9, -2.75, -2.5, -0.5, 2.5, 2.6, 2.8, 3.0, 3.2, 3.5):
        exact = (rewards > threshold).mean()
        found = read_at(reads.exceedance(), p, grid(7), threshold=threshold)[0]
        q = read_at(reads.follower(), p, grid(7), threshold=threshold, bound=8.0, beta=1.0)[0]
        np.testing.assert_allclose(found, exact, atol=5e-5)
        np.testing.assert_allclose(q, np.log1p(np.expm1(8.0) * found), atol=1e-9)


@pytest.mark.parametrize("threshold", [-3.5, -2.5, -0.25, 0.0, 0.5, 0.75, 2.0, 3.0])
def test_distribution_D3_exceedance_of_atoms_is_exact_and_strict(threshold):
    found = read_at(reads.exceedance(), laws("B", ATOMS), ATOMS, threshold=threshold)
    exact = prefix_mean(world("B").log_base, 1.0 * (world("B").reward > threshold))
    np.testing.assert_allclose(found, exact, atol=1e-13)


def test_distribution_D3_exceedance_is_exact_at_a_double_point_of_a_grid():
    support = tuple(sorted((*grid(25), 0.5)))  # 0.5 is a point of the grid already
    for threshold in (0.5, np.nextafter(0.5, 0)):
        found = read_at(reads.exceedance(), laws("A", support), support, threshold=threshold)
        exact = prefix_mean(world("A").log_base, 1.0 * (world("A").reward > 0.5))
        np.testing.assert_allclose(found, exact, atol=1e-12)
    beside = read_at(reads.exceedance(), laws("A", grid(25)), grid(25), threshold=0.5)
    assert np.abs(beside - exact).max() > 0.01


G = ((0.25, 0.007806), (0.5, 0.031142), (1.0, 0.123302), (2.0, 0.474475), (4.0, 1.66985), (8.0, 4.92291))


def test_distribution_D5_the_error_of_a_bin_and_where_it_is_attained():
    step, value = np.array(G).T
    found = np.asarray(grid_error(step, beta=1.0))
    np.testing.assert_allclose(found, value, rtol=4e-6, atol=5.5e-7)
    assert (found <= step**2 / 8).all()
    np.testing.assert_allclose(grid_error(step * 0.3, beta=0.3), found, rtol=1e-14)
    for h, g in zip(step, found, strict=True):
        share = np.append(np.linspace(0, 1, 201), 1 / h - 1 / np.expm1(h))
        ratio = np.log(two_hot(share * h, (0.0, h)) @ np.exp([0, h])) - share * h
        assert (ratio >= -1e-14).all()
        assert (ratio <= g + 1e-14).all()
        np.testing.assert_allclose(ratio[-1], g, rtol=1e-12)


def test_distribution_D5_the_error_of_a_bin_keeps_its_digits():
    h = np.geomspace(1e-3, 80, 60)
    exact = np.asarray(grid_error(h, beta=1.0))
    single = np.asarray(grid_error(h.astype(np.float32), beta=np.float32(1)))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, exact, rtol=5e-5)
    near = np.asarray(grid_error(np.array([0.25 - 1e-9, 0.25 + 1e-9]), beta=1.0))
    assert near[1] == pytest.approx(near[0], rel=1e-7)  # the series meets the closed form


@functools.partial(jax.jit, static_argnums=3)
def fitted(logits, weight, target, steps: int = 800):
    """The table of logits [121,K] after gradient steps on the loss of all prefixes of responses of weight [81]."""
    optimiser = optax.adam(optax.cosine_decay_schedule(0.5, steps), b2=0.9, eps=1e-20)
    mask = jnp.ones((1, 5), bool)

    def loss(logits):
        log_p = jax.nn.log_softmax(logits)[PREFIX]
        each = jax.vmap(lambda p, t: losses.distribution(p[None], target=t[None], mask=mask))(log_p, target)
        return (weight * each).sum()

    def step(carry, _):
        logits, state = carry
        update, state = optimiser.update(jax.grad(loss)(logits), state)
        return (logits + update, state), None

    return jax.lax.scan(step, (logits, optimiser.init(logits)), None, length=steps)[0][0]


UNIFORM = np.full(81, 1 / 81)


def test_distribution_D6_roll_outs_reach_the_law_of_the_policy_that_drew_them():
    base, target = world("B").log_base, two_hot(world("B").reward, ATOMS)
    start = jnp.zeros((121, len(ATOMS)))
    found = jax.nn.softmax(fitted(start, np.exp(base), target))
    np.testing.assert_allclose(found, laws("B", ATOMS), atol=1e-5)
    # Data of another policy give that policy's laws, not the base's.
    found = jax.nn.softmax(fitted(start, UNIFORM, target))
    np.testing.assert_allclose(found, prefix_mean(np.log(UNIFORM), target), atol=1e-5)
    assert np.abs(found - laws("B", ATOMS)).max() > 0.1


def bellman_target(p: np.ndarray) -> np.ndarray:
    """Σ_z pi_ref(z|s)·p(sz) of each prefix [121,K], and two-hot rewards at the end."""
    below = jnp.moveaxis(jnp.asarray(p[1:]).reshape(40, 3, -1), 1, 2)  # [40,K,3]
    log_ref = jnp.broadcast_to(world("B").log_ref[:, None], below.shape)
    mixed = losses.expected_next(below, log_prob_ref=log_ref)
    return np.concatenate([mixed, two_hot(world("B").reward, ATOMS)])


def test_distribution_D6_bellman_targets_reach_the_same_law_from_other_data():
    exact = laws("B", ATOMS)
    np.testing.assert_allclose(bellman_target(exact), exact, atol=1e-12)
    logits = jnp.zeros((121, len(ATOMS)))
    for _ in range(5):  # the law of the end moves up by one token a round
        logits = fitted(logits, UNIFORM, bellman_target(np.asarray(jax.nn.softmax(logits)))[PREFIX])
    np.testing.assert_allclose(jax.nn.softmax(logits), exact, atol=1e-5)


def test_distribution_D6_the_loss_by_hand_and_what_is_masked_out():
    rng = np.random.default_rng(1)
    log_p = np.array(jax.nn.log_softmax(rng.normal(size=(3, 4, 5))))
    target = two_hot([-2.0, 0.05, np.nan], UNEVEN)
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    log_p[1, 1] = np.nan
    log_p[0, :, 4] = -np.inf  # no mass of the target there
    found, slope = jax.value_and_grad(losses.distribution)(jnp.asarray(log_p), target=target, mask=mask)
    rows = [-(target[b][target[b] > 0] @ log_p[b, t][target[b] > 0]) for b, t in np.argwhere(mask)]
    np.testing.assert_allclose(found, np.mean(rows), rtol=1e-14)
    np.testing.assert_allclose(slope[:2], -np.where(mask[:2, :, None], target[:2, None], 0) / 6, atol=1e-15)
    np.testing.assert_array_equal(slope[2], 0)
    wide = losses.distribution(log_p[:2], target=np.repeat(target[:2, None], 4, axis=1), mask=mask[:2])
    np.testing.assert_allclose(wide, found, rtol=1e-14)
    assert losses.distribution(log_p, target=target, mask=np.zeros_like(mask)) == 0
    assert np.isnan(losses.distribution(log_p, target=target, mask=np.ones_like(mask)))  # a NaN that counts is seen


def test_distribution_D8_values_of_the_prompt():
    p = laws("B", ATOMS)
    best = [read_at(reads.expected_max(), p, ATOMS, n=n)[0] for n in (1, 2, 4, 8)]
    np.testing.assert_allclose(best, [-0.21374, 0.40939, 0.95935, 1.35327], atol=5.5e-6)
    assert read_at(reads.cvar(), p, ATOMS, level=0.25)[0] == pytest.approx(-1.52285, abs=5.5e-6)
    assert read_at(reads.quantile(), p, ATOMS, level=0.25)[0] == -1


def test_distribution_D8_values_of_every_prefix_by_enumeration():
    p, log_base, reward = laws("B", ATOMS), world("B").log_base, world("B").reward
    below = [prefix_mean(log_base, 1.0 * (reward <= c)) for c in ATOMS]  # F_i of each prefix
    for n in (0.5, 3.0):
        power = np.diff(np.power(below, n), axis=0, prepend=0)
        np.testing.assert_allclose(read_at(reads.expected_max(), p, ATOMS, n=n), np.asarray(ATOMS) @ power, atol=1e-12)
    for level in (0.1, 0.6, 1.0):
        kept = np.diff(np.minimum(below, level), axis=0, prepend=0) / level
        np.testing.assert_allclose(read_at(reads.cvar(), p, ATOMS, level=level), np.asarray(ATOMS) @ kept, atol=1e-12)
    first = np.asarray(ATOMS)[(np.asarray(below) >= 0.37).argmax(axis=0)]
    np.testing.assert_array_equal(read_at(reads.quantile(), p, ATOMS, level=0.37), first)
    np.testing.assert_allclose(read_at(reads.cvar(), p, ATOMS, level=1.0), read_at(reads.mean(), p, ATOMS), atol=1e-12)


def test_distribution_D11_numbers_of_other_names_or_values():
    for read, numbers, message in (
        (reads.soft(), {}, "beta"),
        (reads.soft(), {"beta": 1.0, "bound": 2.0}, "found .*bound"),
        (reads.soft(), 1.0, "expected numbers"),
        (reads.mean(), {"beta": 1.0}, "for mean"),
        (reads.follower(solve=True), {"beta": 1.0, "bound": 1.0, "threshold": 0.0}, "for follower"),
        (reads.soft(), {"beta": 0.0}, "beta: expected a value > 0"),
        (reads.soft(), {"beta": np.array([1.0, -1.0])}, "beta: expected a value > 0"),
        (reads.follower(), {"beta": 1.0, "bound": 0.0, "threshold": 0.0}, "bound: expected a value > 0"),
        (reads.follower(), {"beta": 1.0, "bound": 1.0, "threshold": np.nan}, "threshold: expected a number"),
        (reads.shaped(jnp.tanh), {"beta": -1.0, "map": None}, "beta: expected a value > 0"),
        (reads.calibrated(jnp.tanh), {"beta": 0.0}, "beta: expected a value > 0"),
        (reads.best_of(), {"n": 0.0}, "n: expected a value > 0"),
        (reads.worst_of(), {"n": -2.0}, "n: expected a value > 0"),
        (reads.expected_max(), {"n": np.nan}, "n: expected a value > 0"),
        (reads.chi_squared(), {"beta": 0.0}, "beta: expected a value > 0"),
        (reads.kl(), {"nats": 0.0}, "nats: expected a value > 0"),
        (reads.quantile(), {"level": 0.0}, "level: expected a share"),
        (reads.cvar(), {"level": 1.5}, "level: expected a share"),
    ):
        with pytest.raises(ValueError, match=message):
            _reading.check_numbers(read, numbers)


def test_distribution_D11_readings_of_ones_own():
    p = laws("B", ATOMS)[:4]
    bonus = reads.of(log_omega=lambda numbers, support, log_p: support * numbers["rate"], numbers=("rate",))
    same = read_at(reads.soft(), p, ATOMS, beta=0.5)
    np.testing.assert_allclose(read_at(bonus, p, ATOMS, rate=2.0), same, atol=1e-12)
    spread = reads.of(value=lambda numbers, support, log_p, log_p_prompt: (jnp.exp(log_p) * support**2).sum(axis=-1))
    np.testing.assert_allclose(read_at(spread, p, ATOMS), p @ np.square(ATOMS), atol=1e-12)
    for wrong in ({}, {"log_omega": jnp.exp, "value": jnp.exp}, {"value": 3.0}):
        with pytest.raises(ValueError, match=r"log_omega or value|value"):
            reads.of(**wrong)
    with pytest.raises(ValueError, match=r"mine: expected log_omega of shape \(1, 13\).*found \(2,\)"):
        read_at(reads.of(log_omega=lambda *_: jnp.zeros(2), name="mine"), p, ATOMS)
    with pytest.raises(ValueError, match=r"mine: expected a value of shape \(1, 4\), found \(1, 4, 13\)"):
        read_at(reads.of(value=lambda numbers, support, log_p, _: log_p, name="mine"), p, ATOMS)
    for builder in (reads.shaped, reads.calibrated):
        with pytest.raises(ValueError, match="expected a function"):
            builder(3.0)


def test_what_is_no_number_is_seen_in_every_value():
    p = laws("B", ATOMS)[:4]
    broken = np.where(np.arange(4)[:, None] == 2, np.nan, p)
    for read, numbers in (
        (reads.soft(), {"beta": 1.0}),
        (reads.mean(), {}),
        (reads.expected_max(), {"n": 2.0}),
        (reads.exceedance(), {"threshold": 0.1}),
        (reads.quantile(), {"level": 0.5}),
        (reads.cvar(), {"level": 0.5}),
    ):
        np.testing.assert_array_equal(np.isnan(read_at(read, broken, ATOMS, **numbers)), [False, False, True, False])
    unknown = reads.of(log_omega=lambda numbers, support, log_p: support * jnp.nan)
    assert np.isnan(read_at(unknown, p, ATOMS)).all()
    weights = _reading.log_weights(
        reads.chi_squared(), {"beta": jnp.nan}, jnp.asarray(ATOMS), jnp.log(jnp.asarray(p[:1])), atoms=True
    )
    assert np.isnan(weights[0]).all()


def test_a_prefix_that_cannot_exceed_keeps_its_weight_at_any_bound():
    p = laws("B", ATOMS)
    share = prefix_mean(world("B").log_base, 1.0 * (world("B").reward > 0.25))
    for kind, bound in ((np.float32, 200.0), (np.float64, 1000.0)):
        q = read_at(reads.follower(), p.astype(kind), ATOMS, threshold=0.25, bound=bound, beta=1.0)
        np.testing.assert_allclose(q[share < 1e-12], 0, atol=1e-4)
        np.testing.assert_allclose(q[share > 0.01], np.log(share[share > 0.01]) + bound, rtol=1e-5)
    logit = log_of(share) - log_of(np.clip(1 - share, 0, 1))
    q = read_at(reads.follower(), p, ATOMS, threshold=0.25, bound=3.0, beta=2.0)
    np.testing.assert_allclose(q, shaping.exceedance_log_weight(np.clip(logit, -700, 700), gain=1.5), atol=1e-12)

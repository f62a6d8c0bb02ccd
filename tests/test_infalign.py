"""InfAlign's calibrated rewards and transformations: their exact properties."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign import infalign, metrics, policies, shaping, tree
from tests import exact


@pytest.fixture(autouse=True)
def _float64():
    """Identities hold in float64; tests of float32 pass arrays of that type."""
    with jax.enable_x64(True):
        yield


def random(seed: int, *shape: int, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, rewards) of the outcomes on the last axis; with ties, rewards of few levels."""
    rng = np.random.default_rng(seed)
    reward = rng.integers(0, 4, shape).astype(float) if ties else rng.normal(size=shape)
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1]), reward


def wins(y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """w_r of every pair [...,n,K]."""
    y, z = np.asarray(y)[..., :, None], np.asarray(z)[..., None, :]
    return (y > z) + 0.5 * (y == z)


# Calibration


def test_infalign_T9_calibration_is_the_mean_win_over_the_reference():
    rng = np.random.default_rng(0)
    reward = rng.integers(-1, 6, (3, 7)).astype(float)
    reference = rng.integers(0, 5, (3, 9)).astype(float)
    expected = wins(reward, reference).mean(-1)
    np.testing.assert_allclose(infalign.calibrate(reward, reference=reference), expected, atol=1e-15)
    # The order of the table does not matter, nor who sorted it, nor how prompts are batched.
    table = infalign.calibration_table(reference)
    np.testing.assert_array_equal(table, np.sort(reference))
    np.testing.assert_allclose(infalign.calibrate(reward, reference=table, is_sorted=True), expected, atol=1e-15)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(lambda r, s: infalign.calibrate(r, reference=s)))(reward, reference), expected, atol=1e-15
    )
    np.testing.assert_allclose(infalign.calibrate(reward, reference=reference[1])[1], expected[1], atol=1e-15)
    np.testing.assert_allclose(infalign.calibrate(reward[0], reference=reference)[0], expected[0], atol=1e-15)
    np.testing.assert_allclose(infalign.calibrate(reward[2, 3], reference=reference[2]), expected[2, 3], atol=1e-15)
    stacked = infalign.calibrate(np.stack([reward, reward]), reference=reference)
    np.testing.assert_allclose(stacked, [expected, expected], atol=1e-15)
    smooth = infalign.calibrate(reward, reference=reference, smooth=True)
    np.testing.assert_allclose(smooth, (9 * expected + 0.5) / 10, atol=1e-15)
    assert infalign.calibrate(reward.astype(np.float32), reference=reference.astype(np.float32)).dtype == "float32"


def test_infalign_T9_its_mean_over_draws_is_the_calibrated_reward_and_its_variance_is_known():
    """Every table of 4 draws from 3 outcomes; a reward between two of them has no ties, one on a level has."""
    prob, level = np.array([0.2, 0.5, 0.3]), np.array([0.0, 1.0, 2.0])
    tables = np.array(list(itertools.product(range(3), repeat=4)))
    weight = prob[tables].prod(-1)
    for reward, c in ((1.5, 0.7), (1.0, 0.45), (2.0, 0.85), (-1.0, 0.0)):
        found = np.asarray(infalign.calibrate(np.full((len(tables), 1), reward), reference=level[tables]))[:, 0]
        np.testing.assert_allclose(weight @ found, c, atol=1e-14)
        variance = weight @ (found - c) ** 2
        assert variance <= 1 / 16 + 1e-14
        if reward == 1.5:
            np.testing.assert_allclose(variance, c * (1 - c) / 4, atol=1e-14)
            for a in (-3.0, 10.0):
                np.testing.assert_allclose(weight @ np.exp(a * found), (1 - c + c * np.exp(a / 4)) ** 4, rtol=1e-13)


def test_infalign_T9_factors_of_the_exponential_and_bias_of_the_smoothed_logarithm():
    """Ĉ of n draws is binomial: E e^{aĈ}/e^{aC} is 1.11, 1.37 and 2.9 at C = .7, a = 10; the logarithm of the smoothed
    count is off by at most .006 at n = 100 and .018 at 32, for C in [.1, .9]."""
    for n, factor, near in ((100, 1.11, 5e-3), (32, 1.37, 1e-2), (8, 2.9, 0.1)):
        found = (0.3 + 0.7 * np.exp(10 / n)) ** n / np.exp(7)
        np.testing.assert_allclose(found, factor, atol=near)
    for n, bias in ((100, 0.006), (32, 0.018)):
        table, count = np.arange(n, dtype=float), np.arange(n + 1)
        # A reward of count − ½ wins `count` times.
        smooth = np.asarray(infalign.calibrate(count - 0.5, reference=table, smooth=True))
        np.testing.assert_allclose(smooth, (count + 0.5) / (n + 1), atol=1e-15)
        log_binomial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(n, 0, -1) / np.arange(1, n + 1)))])
        worst = 0.0
        for c in np.linspace(0.1, 0.9, 17):
            law = np.exp(log_binomial + count * np.log(c) + (n - count) * np.log1p(-c))
            worst = max(worst, abs(law @ np.asarray(infalign.log(smooth)) - np.log(c)))
        assert 0.8 * bias < worst < bias


def test_infalign_T9_tends_to_the_calibrated_reward_as_the_table_grows():
    prob, reward = random(1, 8)
    exact_c = infalign.mid_rank(prob, rank=infalign.ranks(reward))
    table = np.random.default_rng(0).choice(reward, 200_000, p=prob)
    # Five deviations of a mean of 200,000 draws in [0, 1].
    np.testing.assert_allclose(infalign.calibrate(reward, reference=table), exact_c, atol=5 * 0.5 / np.sqrt(200_000))


def test_a_width_is_preference_as_reward_at_one_and_differentiable():
    rng = np.random.default_rng(2)
    reward, reference = rng.normal(size=(2, 4)), rng.normal(size=(2, 6))
    np.testing.assert_allclose(
        infalign.calibrate(reward, reference=reference, width=1.0),
        shaping.preference_as_reward(reward, reference=reference),
        atol=1e-15,
    )
    smoothed = lambda r, s, w: infalign.calibrate(r, reference=s, width=w)  # noqa: E731
    check_grads(smoothed, (reward, reference, 0.7), order=2, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(
        smoothed(reward, reference, 1e-9), infalign.calibrate(reward, reference=reference), atol=1e-12
    )
    slope = jax.grad(lambda r: infalign.calibrate(r, reference=reference).sum())(jnp.asarray(reward))
    np.testing.assert_array_equal(slope, 0)


def test_infalign_T3_properties_of_the_calibrated_reward():
    prob, reward = random(3, 50, 6)
    rank = infalign.ranks(reward)
    c = np.asarray(infalign.mid_rank(prob, rank=rank))
    np.testing.assert_allclose(c, (wins(reward, reward) * prob[:, None]).sum(-1), atol=1e-14)
    for row in range(50):
        mass = np.array([prob[row][reward[row] == v].sum() for v in np.unique(reward[row])])
        # Q1: the ends; Q3: the mean and the variance.
        assert c[row].min() == pytest.approx(mass[0] / 2, abs=1e-14)
        assert c[row].max() == pytest.approx(1 - mass[-1] / 2, abs=1e-14)
        assert prob[row] @ (c[row] - 0.5) ** 2 == pytest.approx((1 - (mass**3).sum()) / 12, abs=1e-14)
    np.testing.assert_allclose((prob * c).sum(-1), 0.5, atol=1e-14)
    # Q2: any strictly increasing map, also one per prompt, leaves it as it is.
    rng = np.random.default_rng(4)
    scale, shift = np.exp(rng.normal(size=(50, 1))), rng.normal(size=(50, 1))
    for mapped in (np.exp(reward), (reward - 1) ** 3, scale * reward + shift):
        np.testing.assert_array_equal(infalign.mid_rank(prob, rank=infalign.ranks(mapped)), c)
        np.testing.assert_array_equal(
            infalign.calibrate(mapped, reference=mapped), infalign.calibrate(reward, reference=reward)
        )
    # Q4: with ever smaller atoms it is uniform.
    fine = infalign.mid_rank(np.full(1000, 1e-3), rank=np.arange(1000))
    np.testing.assert_allclose(fine, (np.arange(1000) + 0.5) / 1000, atol=1e-14)
    # Q5: the win rate is its mean; against itself it is 1/2, whatever runs on top.
    other = random(5, 50, 6)[0]
    np.testing.assert_allclose(infalign.win_rate(other, against=prob, rank=rank), (other * c).sum(-1), atol=1e-14)
    for procedure in (infalign.none(), infalign.best_of(3), infalign.worst_of(4)):
        np.testing.assert_allclose(
            infalign.procedure_win_rate(prob, base=prob, rank=rank, procedure=procedure), 0.5, atol=1e-14
        )


# Transformations


@pytest.mark.parametrize("text", ["identity", "log", "exp:5", "exp:10", "exp:-10", "exp:1e-3", "bon:4", "won:4"])
def test_transforms_increase_and_keep_their_type_and_derivative(text):
    transform = infalign.parse_transform(text)
    assert infalign.parse_transform(f" {text} ") is transform
    infalign.check_increasing(transform)
    c = np.linspace(0.2, 0.9, 7)
    check_grads(transform, (c,), order=1, atol=1e-6, rtol=1e-6)
    found = transform(jnp.asarray(c, jnp.float32).reshape(7, 1))
    assert (found.dtype, found.shape) == ("float32", (7, 1))
    np.testing.assert_allclose(found[:, 0], transform(c), rtol=2e-5)
    if text != "log":
        low = -1 if text.startswith("won") else 0
        np.testing.assert_allclose(transform(np.array([0.0, 1.0])), [low, low + 1], atol=1e-15, rtol=1e-15)


def test_transforms_by_hand():
    c = np.array([0.0, 0.25, 1.0])
    np.testing.assert_allclose(infalign.exponential(3.0)(c), np.expm1(3 * c) / np.expm1(3), rtol=1e-14)
    np.testing.assert_allclose(infalign.exponential(-3.0)(c), (1 - np.exp(-3 * c)) / (1 - np.exp(-3)), rtol=1e-14)
    np.testing.assert_allclose(infalign.best_of_n_power(3)(c), c**5, rtol=1e-14)
    np.testing.assert_allclose(infalign.worst_of_n_power(3)(c), -((1 - c) ** 5), rtol=1e-14)
    np.testing.assert_allclose(infalign.log(c), [-np.inf, np.log(0.25), 0])
    # No overflow where e^a has no float32.
    np.testing.assert_allclose(infalign.exponential(200.0)(np.float32([0.75, 1])), [np.exp(-50), 1], rtol=1e-4)
    found = infalign.tabulated([0.0, 0.5, 1.0], [-1.0, -0.5, 0.0])
    np.testing.assert_allclose(found(jnp.array([0.25, 0.75, 1.0])), [-0.75, -0.25, 0], atol=1e-15)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("reference: expected at least 2", lambda: infalign.calibrate([1.0], reference=[1.0])),
        ("reference: expected at least 2", lambda: infalign.calibrate([1.0], reference=1.0)),
        ("reference: expected numbers", lambda: infalign.calibrate([1.0], reference=[1.0, np.nan])),
        ("reference: expected numbers", lambda: infalign.calibration_table([1.0, np.nan])),
        ("reference: expected a table sorted", lambda: infalign.calibrate([1.0], reference=[2.0, 1.0], is_sorted=True)),
        ("width: expected", lambda: infalign.calibrate([1.0], reference=[1.0, 2.0], width=0.0)),
        ("width: expected", lambda: infalign.calibrate([1.0], reference=[1.0, 2.0], width=np.nan)),
        ("a: expected", lambda: infalign.exponential(0.0)),
        ("a: expected", lambda: infalign.exponential(np.inf)),
        ("n: expected", lambda: infalign.best_of_n_power(0)),
        ("n: expected", lambda: infalign.worst_of_n_power(1.5)),
        ("n: expected", lambda: infalign.best_of(0)),
        ("transform: expected values that do not decrease", lambda: infalign.check_increasing(lambda c: -c)),
        ("transform: expected values", lambda: infalign.check_increasing(lambda c: jnp.exp(-10 * c))),
        ("reward_map: expected finite", lambda: infalign.check_increasing(lambda c: 0 * c / 0, name="reward_map")),
        ("transform: expected a transform that incr", lambda: infalign.check_increasing(jnp.ones_like)),
        ("value: expected values", lambda: infalign.tabulated([0.0, 1.0], [1.0, 0.0])),
        ("c: expected sorted", lambda: infalign.tabulated([1.0, 0.0], [0.0, 1.0])),
        ("c, value: expected one shape", lambda: infalign.tabulated([0.0, 1.0], [0.0])),
        ("score: expected numbers", lambda: infalign.ranks([1.0, np.nan])),
        ("score: expected shape", lambda: infalign.ranks([])),
        *((r"identity, log, exp:A \(A not 0\), bon:N, won:N", lambda t=t: infalign.parse_transform(t)) for t in
          ("", "exp", "exp:0", "exp:x", "bon:0", "won:1.5", "identity:2", "square")),
    ],
)  # fmt: skip
def test_bad_input_is_named(field, call):
    with pytest.raises(ValueError, match=field):
        call()


def test_nan_under_jit_shows_in_its_row_only():
    reference = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 1.0, 2.0]])
    reward = jnp.array([[0.5, 0.5], [jnp.nan, 0.5]])
    for options in ({}, {"width": 1.0}):
        found = jax.jit(lambda r, s, o=options: infalign.calibrate(r, reference=s, **o))(reward, reference)
        np.testing.assert_array_equal(np.isnan(found), [[True, True], [True, False]])


# On a tree


def test_infalign_T10_the_tilt_on_a_tree_is_soft_value_decoding():
    t = tree.Tree(3, 3, eos_id=0)
    log_ref, reward = exact.tables(t, 0)
    reward = jnp.round(reward)  # ties
    law = tree.response_log_prob(t, log_ref)
    c = infalign.mid_rank(jnp.exp(law), rank=infalign.ranks(reward))
    decode = policies.tilt(tree.policy(t), tree.critic(t, "level"))
    for text, beta in (("identity", 0.3), ("exp:10", 0.1), ("exp:-10", 0.1), ("won:4", 0.05)):
        aligned = infalign.parse_transform(text)(c)
        q = tree.q_values(t, tree.soft_value(t, log_ref, aligned, beta=beta), reward=aligned)
        found = exact.log_law(t, decode, {"policy": log_ref, "critic": q, "beta": jnp.asarray(beta)})
        np.testing.assert_allclose(found, exact.gibbs_law(law, aligned, beta), atol=1e-12)
        np.testing.assert_allclose(found, tree.optimal_log_prob(t, log_ref, aligned, beta=beta), atol=1e-12)


# From samples


def test_win_rates_under_selection_are_means_over_all_pairs_of_subsets():
    rng = np.random.default_rng(6)
    y, z = rng.integers(0, 4, (2, 6)).astype(float), rng.integers(0, 4, (2, 5)).astype(float)
    found = metrics.selection_win_rates(y, base_reward=z)
    assert found.best_of_n.shape == found.worst_of_n.shape == (2, 5)
    for row, n in itertools.product(range(2), range(1, 6)):
        pairs = list(itertools.product(itertools.combinations(y[row], n), itertools.combinations(z[row], n)))
        for name, choose in (("best_of_n", max), ("worst_of_n", min)):
            mean = np.mean([float(wins([choose(a)], [choose(b)])[0, 0]) for a, b in pairs])
            assert getattr(found, name)[row, n - 1] == pytest.approx(mean, abs=1e-13), (row, n, name)


def test_win_rates_under_selection_are_unbiased():
    """Over every pair of draws of 3 from 3 outcomes, two of one reward: the exact win rates."""
    q, p, reward = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3]), np.array([0.0, 1.0, 1.0])
    rank = infalign.ranks(reward)
    draws = np.array(list(itertools.product(range(3), repeat=3)))
    left, right = (np.repeat(draws, 27, axis=0), np.tile(draws, (27, 1)))
    weight = q[left].prod(-1) * p[right].prod(-1)
    found = metrics.selection_win_rates(reward[left], base_reward=reward[right])
    for n in (1, 2, 3):
        best, worst = (weight @ x[:, n - 1] for x in found)
        np.testing.assert_allclose(
            best, infalign.procedure_win_rate(q, base=p, rank=rank, procedure=infalign.best_of(n)), atol=1e-13
        )
        np.testing.assert_allclose(
            worst, infalign.procedure_win_rate(q, base=p, rank=rank, procedure=infalign.worst_of(n)), atol=1e-13
        )


def test_win_rates_under_selection_are_better_than_those_of_disjoint_groups():
    """n_eval 16, N = 4: deviations of .13 to .16 against .18 to .21 for four disjoint groups."""
    y, z = np.random.default_rng(7).normal(size=(2, 4000, 16))
    found = metrics.selection_win_rates(y + 0.3, base_reward=z)
    for rates, choose in ((found.best_of_n, np.max), (found.worst_of_n, np.min)):
        groups = (choose(y.reshape(-1, 4, 4) + 0.3, axis=-1) > choose(z.reshape(-1, 4, 4), axis=-1)).mean(-1)
        assert rates[:, 3].std() < 0.85 * groups.std()
        # Two means of 4000 prompts.
        assert abs(rates[:, 3].mean() - groups.mean()) < 5 * groups.std() / np.sqrt(4000)


@pytest.mark.parametrize(("y", "z"), [(np.zeros((2, 0)), np.zeros((2, 3))), (np.zeros((2, 3)), np.zeros((3, 3)))])
def test_win_rates_under_selection_name_bad_shapes(y, z):
    with pytest.raises(ValueError, match="reward, base_reward: expected"):
        metrics.selection_win_rates(y, base_reward=z)
    with pytest.raises(ValueError, match="NaN"):
        metrics.selection_win_rates(np.array([np.nan, 1.0]), base_reward=np.zeros(2))

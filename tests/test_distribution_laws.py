"""Laws of whole responses that readings of a law of rewards decode token by token, and the derivatives of readings.
D4, D5, D7 to D10."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import gibbs, infalign, shaping, tree
from jaxalign._arrays import NEGATIVE
from jaxalign.critics import _reading, reads
from tests.exact import total_variation
from tests.reward_laws import (
    ATOMS,
    TREE,
    compute,
    decoded,
    grid,
    laws,
    log_of,
    mean_and_kl,
    prefix_mean,
    read_at,
    reweighed,
    two_hot,
    world,
)


@pytest.fixture(autouse=True)
def _float64():
    """Identities hold in float64; tests of float32 say so."""
    with jax.enable_x64(True):
        yield


def same_law(found: np.ndarray, exact: np.ndarray) -> None:
    np.testing.assert_allclose(np.exp(found), np.exp(exact), atol=1e-12)


@functools.partial(jax.jit, static_argnums=(0, 1))
def log_weights(read, atoms, numbers, support, log_p_prompt):
    return _reading.log_weights(read, numbers, support, log_p_prompt, atoms=atoms)


def weights(read: reads.Read, name: str, support: tuple[float, ...], **numbers) -> tuple[np.ndarray, float]:
    """(log omega [K] less its largest, what was taken out) for the law of the prompt."""
    log_p = log_of(laws(name, support)[:1])
    found = log_weights(read, support == ATOMS, numbers, np.asarray(support), log_p)
    return np.asarray(found[0])[0], float(found[1][0])


@pytest.mark.parametrize(("threshold", "bound"), [(-0.25, 1.0), (0.75, 3.0), (1.25, 3.0), (0.5, 2.0)])
def test_distribution_D4_the_follower_of_atoms_is_its_enumeration(threshold, bound):
    """One head, every threshold and bound; the last one at an atom, which is not above itself."""
    found = decoded("B", reads.follower(), ATOMS, threshold=threshold, bound=bound, beta=1.0)
    same_law(found, reweighed("B", np.exp(bound * (world("B").reward > threshold))))
    same_law(found, decoded("B", reads.follower(), ATOMS, threshold=threshold, bound=bound / 2, beta=0.5))


@pytest.mark.parametrize(("bound", "distance"), [(1.0, 0.0067), (3.0, 0.0154)])
def test_distribution_D4_the_follower_of_a_grid_is_that_of_the_trapezoid(bound, distance):
    found = decoded("A", reads.follower(), grid(97), threshold=0.4, bound=bound, beta=1.0)
    share = np.clip((np.asarray(grid(97)) - 0.4) / (6 / 96) + 0.5, 0, 1)
    hot = two_hot(world("A").reward, grid(97))
    same_law(found, reweighed("A", hot @ (1 + np.expm1(bound) * share)))
    hard = reweighed("A", np.exp(bound * (world("A").reward > 0.4)))
    assert total_variation(found, hard) == pytest.approx(distance, abs=5.5e-5)


@pytest.mark.parametrize(
    ("gain", "exact", "count", "solved"),
    [(1.0, 0.26267, 25, 0.26299), (1.0, 0.26267, 97, None), (3.0, 1.04441, 25, 1.05373), (3.0, 1.04441, 97, 1.04492)],
)
def test_distribution_D4_the_threshold_solved_from_the_law_of_the_prompt(gain, exact, count, solved):
    log_base, reward = world("A").log_base, world("A").reward
    best = float(shaping.optimal_threshold(reward, log_base=log_base, gain=gain))
    log_p = log_of(laws("A", grid(count))[0])
    found = float(shaping.optimal_threshold(np.asarray(grid(count)), log_base=log_p, gain=gain))
    assert best == pytest.approx(exact, abs=5.5e-6)
    assert solved is None or found == pytest.approx(solved, abs=5.5e-6)
    width = 6 / (count - 1)
    inside = np.floor((reward + 3) / width) == np.floor((best + 3) / width)
    assert -1e-13 <= found - best <= np.expm1(gain) * width / 4 * np.exp(log_base)[inside].sum() + 1e-13
    # The reading without a threshold is the one at that threshold, at every prefix.
    for beta in (1.0, 0.4):
        numbers = {"bound": gain * beta, "beta": beta}
        own = read_at(reads.follower(solve=True), laws("A", grid(count)), grid(count), **numbers)
        given = read_at(reads.follower(), laws("A", grid(count)), grid(count), threshold=found, **numbers)
        np.testing.assert_allclose(own, given, atol=1e-12)


@pytest.mark.parametrize(
    ("count", "largest", "bound", "distance"), [(25, 0.0837, 0.1233, 0.0141), (49, None, 0.0312, 0.0026)]
)
def test_distribution_D5_the_decoded_law_errs_by_one_response_not_by_its_tokens(count, largest, bound, distance):
    found = decoded("A", reads.soft(), grid(count), beta=0.25)
    hot = two_hot(world("A").reward, grid(count))
    same_law(found, reweighed("A", hot @ np.exp(np.asarray(grid(count)) / 0.25)))
    best = np.asarray(tree.optimal_log_prob(TREE, *world("A")[::2], beta=0.25))
    ratio = np.abs(found - best).max()
    assert ratio <= bound
    assert largest is None or ratio == pytest.approx(largest, abs=5.5e-5)
    assert total_variation(found, best) == pytest.approx(distance, abs=5.5e-5)


@pytest.mark.parametrize("beta", [0.3, 1.5])
def test_distribution_D5_the_soft_law_of_atoms_is_the_optimum(beta):
    best = np.asarray(tree.optimal_log_prob(TREE, *world("B")[::2], beta=beta))
    same_law(decoded("B", reads.soft(), ATOMS, beta=beta), best)
    shifted = reads.shaped(lambda m, reward: m["scale"] * jnp.tanh(reward) + m["shift"])
    log_p = jnp.asarray(log_of(laws("B", ATOMS)))
    numbers = {"beta": jnp.asarray(beta), "map": {"scale": 2.0, "shift": 5.0}}
    q = np.asarray(compute(shifted, True, numbers, jnp.asarray(ATOMS), log_p[None], log_p[:1]))[0]
    table = tree.tilted_policy(world("B").log_ref, q[1:].reshape(40, 3), beta=1.0)
    mapped = np.exp(2 * np.tanh(world("B").reward) / beta)
    same_law(np.asarray(tree.response_log_prob(TREE, table)), reweighed("B", mapped))
    exact = np.log(prefix_mean(world("B").log_base, mapped)) + 5 / beta  # the level, not the law alone
    np.testing.assert_allclose(q, exact, atol=1e-12)


BEST = ((2.0, 0.40939, 0.18329), (4.0, 0.95935, 0.62121), (2.5, 0.60073, 0.30485))


@pytest.mark.parametrize(("n", "mean", "kl"), BEST)
def test_distribution_D8_best_of_n_by_tokens_is_its_closed_law(n, mean, kl):
    found = decoded("B", reads.best_of(), ATOMS, n=n)
    same_law(found, np.asarray(tree.best_of_n_law(world("B").log_base, score=world("B").reward, n=n)))
    np.testing.assert_allclose(mean_and_kl("B", found), [mean, kl], atol=5.5e-6)


def test_distribution_D8_best_of_2_is_the_better_of_all_pairs():
    p, reward = np.exp(world("B").log_base), world("B").reward
    wins = 2.0 * (reward[:, None] > reward) + (reward[:, None] == reward)  # in either order; a tie is a coin
    same_law(decoded("B", reads.best_of(), ATOMS, n=2.0), log_of(p * (wins @ p)))


def test_distribution_D8_worst_of_n_by_tokens_is_its_closed_law():
    found = decoded("B", reads.worst_of(), ATOMS, n=3.0)
    same_law(found, np.asarray(tree.worst_of_n_law(world("B").log_base, score=world("B").reward, n=3.0)))
    np.testing.assert_allclose(mean_and_kl("B", found), [-1.12130, 0.41937], atol=5.5e-6)


@pytest.mark.parametrize("n", [0.5, 1.0, 3.0])
def test_distribution_D8_best_of_n_on_a_grid_is_that_of_rewards_rounded_at_random(n):
    rounded = world("A").log_base[:, None] + log_of(two_hot(world("A").reward, grid(25)))  # [81,K], of (y, point)
    score = np.broadcast_to(grid(25), rounded.shape).reshape(-1)
    for read, law in ((reads.best_of(), tree.best_of_n_law), (reads.worst_of(), tree.worst_of_n_law)):
        exact = np.exp(law(rounded.reshape(-1), score=score, n=n)).reshape(rounded.shape).sum(axis=1)
        same_law(decoded("A", read, grid(25), n=n), log_of(exact))


def test_distribution_D8_best_of_n_keeps_its_digits_in_float32():
    p = np.array([1e-6, 0.9, 1e-9, 0.0, 0.0999, 1e-4 - 1e-6 - 1e-9])
    support = np.arange(6.0)
    for read in (reads.best_of(), reads.worst_of()):
        for n in (0.05, 2.0, 64.0):
            exact, single = (
                log_weights(read, True, {"n": kind(n)}, support.astype(kind), log_of(p[None].astype(kind)))
                for kind in (np.float64, np.float32)
            )
            total = np.exp(np.asarray(exact[0])[0] + exact[1][0]) @ p
            assert single[0].dtype == np.float32
            assert total == pytest.approx(1, abs=1e-12)
            there = p > 0
            np.testing.assert_allclose((single[0] + single[1])[:, there], (exact[0] + exact[1])[:, there], atol=2e-4)


def test_distribution_D9_calibrated_is_the_tilt_by_the_table_of_all_responses():
    found = decoded("B", reads.calibrated(infalign.exponential(5.0)), ATOMS, beta=0.3)
    p, reward = np.exp(world("B").log_base), world("B").reward
    rank = (reward[:, None] > reward) @ p + (reward[:, None] == reward) @ p / 2
    same_law(found, reweighed("B", np.exp(np.expm1(5 * rank) / np.expm1(5) / 0.3)))
    assert np.exp(found) @ rank == pytest.approx(0.75768, abs=5.5e-6)


def test_distribution_D9_chi_squared_is_the_truncated_law():
    log_omega, shift = weights(reads.chi_squared(), "B", ATOMS, beta=0.7)
    omega = np.exp(log_omega + shift)
    root = 3 - 0.7 * omega[-1]
    assert root == pytest.approx(-0.63369, abs=5.5e-6)
    np.testing.assert_allclose(omega, np.maximum(0, (np.asarray(ATOMS) - root) / 0.7), atol=1e-12)
    assert laws("B", ATOMS)[0] @ omega == pytest.approx(1, abs=1e-12)
    found = decoded("B", reads.chi_squared(), ATOMS, beta=0.7)
    reward = world("B").reward
    same_law(found, reweighed("B", np.maximum(0, reward - root)))
    assert mean_and_kl("B", found)[0] == pytest.approx(1.02295, abs=5.5e-6)
    assert (np.exp(found)[reward < root] == 0).all()
    assert (reward < root).any()
    q = read_at(reads.chi_squared(), laws("B", ATOMS), ATOMS, beta=0.7)
    empty = prefix_mean(world("B").log_base, 1.0 * (reward > root)) == 0
    assert empty.any()
    assert (q[empty] == NEGATIVE).all()
    assert np.isfinite(q).all()


@pytest.mark.parametrize(("nats", "beta"), [(0.1, 2.49024), (0.5, 1.03554), (1.0, 0.64176)])
def test_distribution_D9_a_budget_of_the_whole_response_is_spent(nats, beta):
    _, shift = weights(reads.kl(), "B", ATOMS, nats=nats)  # the largest reward is 3
    assert 3 / shift == pytest.approx(beta, abs=5.5e-6)
    assert mean_and_kl("B", decoded("B", reads.kl(), ATOMS, nats=nats))[1] == pytest.approx(nats, abs=1e-6)
    # On a grid at most that: rounding at random is a channel.
    spent = mean_and_kl("A", decoded("A", reads.kl(), grid(13), nats=nats))[1]
    assert 0.9 * nats < spent < nats


READINGS = (
    (reads.soft(), {"beta": 0.5}),
    (reads.follower(), {"beta": 0.7, "bound": 2.0, "threshold": 0.4}),
    (reads.follower(solve=True), {"beta": 0.7, "bound": 2.0}),
    (reads.calibrated(infalign.exponential(5.0)), {"beta": 0.3}),
    (reads.best_of(), {"n": 2.5}),
    (reads.worst_of(), {"n": 0.6}),
    (reads.chi_squared(), {"beta": 0.7}),
    (reads.kl(), {"nats": 0.4}),
    (reads.mean(), {}),
    (reads.exceedance(), {"threshold": 0.4}),
    (reads.expected_max(), {"n": 3.0}),
    (reads.quantile(), {"level": 0.3}),
    (reads.cvar(), {"level": 0.3}),
)
NAMES = [read.name + "_solve" * ("threshold" not in numbers) * (i == 2) for i, (read, numbers) in enumerate(READINGS)]


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.value_and_grad, argnums=(2, 4, 5))
def total(read, atoms, numbers, support, logits, prompt, weight):
    """Σ weight·q of laws softmax(logits [N,K]) with the prompt's own, softmax(prompt [K])."""
    log_p, log_p_prompt = jax.nn.log_softmax(logits), jax.nn.log_softmax(prompt)
    return (weight * compute(read, atoms, numbers, support, log_p[None], log_p_prompt[None])[0]).sum()


@pytest.mark.parametrize(("read", "numbers"), READINGS, ids=NAMES)
def test_distribution_D7_gradients_are_central_differences(read, numbers):
    rng = np.random.default_rng(3)
    logits, prompt, weight = rng.normal(size=(4, 13)), rng.normal(size=13), rng.normal(size=4)
    numbers = {name: np.float64(value) for name, value in numbers.items()}
    for atoms in (False, True)[: 1 + (read.on_atoms is not None)]:

        def at(numbers, logits, prompt, atoms=atoms):
            return total(read, atoms, numbers, np.asarray(ATOMS), logits, prompt, weight)

        slope = at(numbers, logits, prompt)[1]
        for name in numbers:
            high, low = (at(numbers | {name: numbers[name] + step}, logits, prompt)[0] for step in (1e-5, -1e-5))
            np.testing.assert_allclose(slope[0][name], (high - low) / 2e-5, rtol=1e-5, atol=1e-7)
            assert (slope[0][name] == 0) == (
                (name == "threshold" and atoms) or (name == "level" and read.name == "quantile")
            )
        way = rng.normal(size=logits.shape)
        high, low = (at(numbers, logits + step * way, prompt)[0] for step in (1e-5, -1e-5))
        np.testing.assert_allclose((slope[1] * way).sum(), (high - low) / 2e-5, rtol=1e-5, atol=1e-7)
        high, low = (at(numbers, logits, prompt + step * way[0])[0] for step in (1e-5, -1e-5))
        np.testing.assert_allclose(slope[2] @ way[0], (high - low) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("read", "numbers"), READINGS, ids=NAMES)
def test_distribution_D7_gradients_are_finite_where_bins_have_no_mass(read, numbers):
    """Bins at log p of −inf, of −800, which is zero, and of −460, whose square is; e to the bound is infinite."""
    p = laws("B", ATOMS)[[0, 1, 30, 100]]
    numbers = {name: np.float64(1000 if name == "bound" else value) for name, value in numbers.items()}
    for floor in (-800.0, -460.0, -np.inf):
        logits = np.maximum(log_of(p), floor)
        for atoms in (False, True)[: 1 + (read.on_atoms is not None)]:
            value, slope = total(read, atoms, numbers, np.asarray(ATOMS), logits, logits[0], np.ones(4))
            # At −inf log_softmax itself has no slope.
            found = (value, slope[0] if np.isinf(floor) else slope)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), (floor, atoms)


def test_distribution_D7_the_soft_values_slope_in_beta_is_minus_the_kl():
    log_p = jnp.asarray(log_of(laws("B", ATOMS)[:1]))

    def value(beta):
        return beta * compute(reads.soft(), True, {"beta": beta}, jnp.asarray(ATOMS), log_p[None], log_p)[0, 0]

    slope = float(jax.grad(value)(0.5))
    tilted = gibbs.log_policy(log_p[0], jnp.asarray(ATOMS), beta=0.5)
    assert slope == pytest.approx(-1.340397, abs=5.5e-7)
    assert slope == pytest.approx(-float(gibbs.kl(tilted, log_p[0])), abs=1e-12)


def test_distribution_D7_the_slope_of_exceedance_in_the_threshold():
    p, width = laws("A", grid(25)), 0.25
    log_p, support = jnp.asarray(log_of(p)), jnp.asarray(grid(25))

    def exceedance(threshold, atoms):
        return compute(reads.exceedance(), atoms, {"threshold": threshold}, support, log_p[None], log_p[:1])[0]

    for threshold in (-0.3, 0.4, 1.1):
        near = np.abs(np.asarray(grid(25)) - threshold) < width / 2
        np.testing.assert_allclose(jax.jacobian(exceedance)(threshold, False), -(p @ near) / width, atol=1e-12)
        np.testing.assert_array_equal(jax.jacobian(exceedance)(threshold, True), 0)


@pytest.mark.parametrize(("read", "numbers"), READINGS, ids=NAMES)
def test_distribution_D10_a_row_of_a_mixed_batch_is_the_row_alone(read, numbers):
    rng = np.random.default_rng(4)
    log_p = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(3, 4, 13))))
    prompt = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(3, 13))))
    support = jnp.asarray(ATOMS)
    mixed = {name: value * jnp.array([0.5, 1.0, 1.3]) for name, value in numbers.items()}
    found = compute(read, True, mixed, support, log_p, prompt)
    assert found.shape == (3, 4)
    for row in range(3):
        own = {name: value[row] for name, value in mixed.items()}
        alone = compute(read, True, own, support, log_p[row : row + 1], prompt[row : row + 1])
        np.testing.assert_allclose(found[row], alone[0], rtol=1e-12, atol=1e-12)
    if read.name in ("soft", "cvar"):  # laws [B,K] give [B]
        np.testing.assert_allclose(compute(read, True, mixed, support, log_p[:, 0], prompt), found[:, 0], atol=1e-12)


def test_distribution_D10_other_numbers_are_no_new_trace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def counted(read, numbers, log_p):
        traces.append(read.name)
        return compute(read, True, numbers, jnp.asarray(ATOMS), log_p[None], log_p[:1])

    log_p = jnp.asarray(log_of(laws("B", ATOMS)[:4]))
    for beta in (0.1, 0.5, 1.0, 2.0, 8.0):
        for bound in (0.5, 1.0, 3.0):
            for threshold in (-0.25, 0.75):
                numbers = {"beta": beta, "bound": bound, "threshold": threshold}
                counted(reads.follower(), {name: jnp.asarray(x) for name, x in numbers.items()}, log_p)
        counted(reads.soft(), {"beta": jnp.asarray(beta)}, log_p)
    assert traces == ["follower", "soft"]


BUILDERS = (
    *(reads.soft, reads.follower, reads.best_of, reads.worst_of, reads.chi_squared, reads.kl, reads.mean),
    *(reads.exceedance, reads.expected_max, reads.quantile, reads.cvar),
    *(lambda: reads.follower(solve=True), lambda: reads.calibrated(infalign.exponential(5.0))),
    lambda: reads.shaped(capped),
)


def capped(limit, reward):
    return jnp.minimum(reward, limit[..., None])


def test_distribution_D10_a_frontier_of_every_reading_is_one_trace():
    """Three values of each number, readings built anew for each: one trace for every reading."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def counted(read, numbers, log_p):
        traces.append(read.name)
        return compute(read, True, numbers, jnp.asarray(ATOMS), log_p[None], log_p[:1])

    log_p = jnp.asarray(log_of(laws("B", ATOMS)[:4]))
    assert {make().name for make in BUILDERS} == {read.name for read, _ in READINGS} | {"shaped"}
    for make in BUILDERS:
        for values in itertools.product((0.3, 0.7, 0.9), repeat=len(make().numbers)):
            numbers = {name: jnp.asarray(x) for name, x in zip(make().numbers, values, strict=True)}
            numbers |= {name: jnp.asarray(1.0) for name in make().free}
            assert np.isfinite(counted(make(), numbers, log_p)).all()
    assert traces == [make().name for make in BUILDERS]

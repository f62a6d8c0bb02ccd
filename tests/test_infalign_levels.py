"""InfAlign over finitely many outcomes with ties: laws, gradients, fixed points and any rule against enumeration."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import gibbs, infalign


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


PROCEDURES = {
    "none": infalign.none(),
    **{f"best of {n}": infalign.best_of(n) for n in (1, 2, 3, 4)},
    **{f"worst of {n}": infalign.worst_of(n) for n in (2, 3, 4)},
}


def random(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(policy, base, rewards of few levels) over the outcomes on the last axis."""
    rng = np.random.default_rng(seed)
    laws = (rng.dirichlet(np.ones(shape[-1]), shape[:-1]) for _ in range(2))
    return *laws, rng.integers(0, 4, shape).astype(float)


def brute(prob: np.ndarray, reward: np.ndarray, n: int, sign: float) -> np.ndarray:
    """The law of the best (sign 1) or worst (sign −1) of n, tuple by tuple, ties at random, in plain Python."""
    law = np.zeros(len(prob))
    for drawn in itertools.product(range(len(prob)), repeat=n):
        weight = np.prod([prob[i] for i in drawn])
        top = max(sign * reward[i] for i in drawn)
        kept = [i for i in drawn if sign * reward[i] == top]
        for i in kept:
            law[i] += weight / len(kept)
    return law


def test_infalign_T1_laws_and_win_rates_are_those_of_all_tuples():
    for (count, n), sign in itertools.product(((3, 4), (6, 2), (6, 4)), (1.0, -1.0)):
        q, p, reward = random(10 * count + n, count)
        rank = infalign.ranks(reward)
        procedure = infalign.best_of(n) if sign > 0 else infalign.worst_of(n)
        laws = [brute(np.asarray(x), reward, n, sign) for x in (q, p)]
        rule = infalign.keep_best(sign * reward)
        for prob, law in zip((q, p), laws, strict=True):
            np.testing.assert_allclose(infalign.selected(prob, rank=rank, procedure=procedure), law, atol=1e-12)
            np.testing.assert_allclose(infalign.enumerated(prob, rule, n), law, atol=1e-12)
        won = (reward[:, None] > reward) + 0.5 * (reward[:, None] == reward)
        expected = laws[0] @ won @ laws[1]
        np.testing.assert_allclose(
            infalign.procedure_win_rate(q, base=p, rank=rank, procedure=procedure), expected, atol=1e-12
        )
        np.testing.assert_allclose(
            infalign.procedure_win_rate(q, base=p, rank=rank, procedure=procedure, selection_rank=rank),
            expected,
            atol=1e-12,
        )
        np.testing.assert_allclose(infalign.rule_win_rate(q, base=p, rank=rank, rule=rule, n=n), expected, atol=1e-12)


def test_infalign_T1_a_procedure_that_picks_by_another_judge():
    """Best and worst of 3 by a judge with ties of its own, win rates by the reward: the joint law of both."""
    for seed, sign in itertools.product(range(5), (1.0, -1.0)):
        q, p, reward = random(seed, 5)
        judge = np.random.default_rng(100 + seed).integers(0, 3, 5).astype(float)
        laws = [brute(np.asarray(x), judge, 3, sign) for x in (q, p)]
        won = (reward[:, None] > reward) + 0.5 * (reward[:, None] == reward)
        procedure = infalign.best_of(3) if sign > 0 else infalign.worst_of(3)
        rank, picked_by = infalign.ranks(reward), infalign.ranks(judge)
        found = infalign.procedure_win_rate(q, base=p, rank=rank, procedure=procedure, selection_rank=picked_by)
        np.testing.assert_allclose(found, laws[0] @ won @ laws[1], atol=1e-12)


def test_ranks_keep_their_order_and_batch():
    score = np.array([[3.0, -1.0, 3.0, 0.5], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(jax.jit(infalign.ranks)(score), [[2, 0, 2, 1], [0, 0, 0, 0]])
    q, p, reward = random(0, 7, 6)
    rank = infalign.ranks(reward)
    together = infalign.procedure_win_rate(q, base=p, rank=rank, procedure=infalign.best_of(3))
    each = [infalign.procedure_win_rate(q[b], base=p[b], rank=rank[b], procedure=infalign.best_of(3)) for b in range(7)]
    np.testing.assert_allclose(together, each, atol=1e-14)


def test_scores_that_are_nan_show_under_jit_and_bad_ranks_are_named():
    score = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 1.0, 2.0]])
    base = np.full(3, 1 / 3)
    found = jax.jit(
        lambda s: infalign.procedure_win_rate(base, base=base, rank=infalign.ranks(s), procedure=infalign.best_of(2))
    )(score)
    np.testing.assert_array_equal(np.isnan(found), [True, False])
    for rank, match in (
        (score[1], "rank: expected whole numbers"),
        (np.array([0, 1, 3]), "rank: expected ranks from 0"),
    ):
        with pytest.raises(ValueError, match=match):
            infalign.mid_rank(base, rank=rank)


def test_small_masses_keep_their_digits():
    """A level of mass 1e-14 gets its share, and with another judge the law still adds to 1."""
    prob = jnp.array([1e-14, 0.5, 0.5 - 1e-14])
    for procedure, share in ((infalign.worst_of(4), 4e-14), (infalign.best_of(2), 1e-28)):
        law = infalign.selected(prob, rank=np.arange(3), procedure=procedure)
        np.testing.assert_allclose(law[0], share, rtol=1e-9)
        np.testing.assert_allclose(law.sum(), 1, atol=1e-14)


@pytest.mark.parametrize("name", PROCEDURES)
def test_infalign_T2_gradients_are_those_of_finite_differences(name):
    q, p, reward = random(3, 6)
    rank, procedure = infalign.ranks(reward), PROCEDURES[name]
    direction = np.eye(6) - 1 / 6  # within the simplex: up to a constant
    rates = lambda prob: infalign.procedure_win_rate(prob, base=p, rank=rank, procedure=procedure)  # noqa: E731
    h = 1e-3
    at = lambda k: np.asarray(rates(q + k * h * direction))  # noqa: E731
    expected = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    for gradient in (infalign.win_rate_gradient(q, base=p, rank=rank, procedure=procedure), jax.grad(rates)(q)):
        np.testing.assert_allclose(gradient - gradient.mean(), expected, atol=1e-9)
    # It increases with the level.
    order = np.argsort(reward, kind="stable")
    assert (
        np.diff(np.asarray(infalign.win_rate_gradient(q, base=p, rank=rank, procedure=procedure))[order]) >= 0
    ).all()


def test_infalign_T8_best_of_n_is_concave_and_worst_of_n_convex():
    left, p, reward = random(4, 4000, 6)
    right, share = random(5, 4000, 6)[0], np.random.default_rng(6).uniform(size=4000)
    rank = infalign.ranks(reward)
    mixed = share[:, None] * left + (1 - share)[:, None] * right
    for n, (make, sign) in itertools.product((2, 4), ((infalign.best_of, 1), (infalign.worst_of, -1))):
        rate = functools.partial(infalign.procedure_win_rate, base=p, rank=rank, procedure=make(n))
        chord = share * rate(left) + (1 - share) * rate(right)
        assert (sign * (rate(mixed) - chord) >= -1e-14).all()
        assert (sign * (rate(mixed) - chord)).max() > 0.01


# Fixed points

SETTINGS = {
    "none": (infalign.none(), 0.1),
    "best of 2": (infalign.best_of(2), 0.1),
    "best of 4": (infalign.best_of(4), 0.05),
    "worst of 2": (infalign.worst_of(2), 0.1),
    "worst of 4": (infalign.worst_of(4), 0.05),
}
BASE, REWARD = random(7, 6)[1:]
LOG_BASE, RANK = np.log(BASE), np.asarray(infalign.ranks(REWARD))


@functools.cache
def solved(name: str) -> infalign.FixedPoint:
    procedure, beta = SETTINGS[name]
    return infalign.optimal_reward(LOG_BASE, rank=RANK, procedure=procedure, beta=beta)


def objective(log_policy, name):
    procedure, beta = SETTINGS[name]
    won = infalign.procedure_win_rate(jnp.exp(log_policy), base=BASE, rank=RANK, procedure=procedure)
    return won - beta * gibbs.kl(log_policy, LOG_BASE)


@pytest.mark.parametrize("name", SETTINGS)
def test_infalign_T5_the_fixed_point_solves_both_equations_and_nothing_beats_it(name):
    procedure, beta = SETTINGS[name]
    found = solved(name)
    assert found.residual < 1e-8
    # Both equations again, from the closed-form gradient.
    reward = infalign.win_rate_gradient(jnp.exp(found.log_policy), base=BASE, rank=RANK, procedure=procedure)
    np.testing.assert_allclose(found.reward, reward - reward.max(), atol=1e-8)
    np.testing.assert_allclose(found.log_policy, gibbs.log_policy(LOG_BASE, reward, beta=beta), atol=1e-8)
    best = objective(found.log_policy, name)
    np.testing.assert_allclose(best, found.objective, atol=1e-14)
    if name == "none":
        c = infalign.mid_rank(BASE, rank=RANK)
        np.testing.assert_allclose(found.reward, c - c.max(), atol=1e-12)
    # The other transforms at the same beta, and policies of every sharpness.
    c = infalign.mid_rank(BASE, rank=RANK)
    texts = ("identity", "log", "exp:5", "exp:10", "exp:-5", "exp:-10")
    tilted = [gibbs.log_policy(LOG_BASE, infalign.parse_transform(text)(c), beta=beta) for text in texts]
    rng = np.random.default_rng(8)
    drawn = jax.nn.log_softmax(rng.normal(size=(2000, 6)) * rng.exponential(3, (2000, 1)))
    others = jnp.concatenate([jnp.stack(tilted), drawn, found.log_policy + 0.05 * drawn[:200]])
    others = jax.nn.log_softmax(others)
    lost = best - objective(others, name)
    assert (lost >= -1e-14).all()
    # The gap inequality of concave win rates; an equality where they are linear.
    gap = beta * gibbs.kl(others, found.log_policy)
    if name == "none":
        np.testing.assert_allclose(lost, gap, atol=1e-12)
    elif name.startswith("best"):
        assert (lost >= gap - 1e-12).all()


def test_infalign_T5_worst_of_n_ends_at_one_objective_from_any_start():
    starts = jax.nn.log_softmax(3 * np.random.default_rng(9).normal(size=(12, 6)))
    for name in ("worst of 2", "worst of 4"):
        procedure, beta = SETTINGS[name]
        rate = functools.partial(infalign.procedure_win_rate, base=BASE, rank=RANK, procedure=procedure)
        ends = jax.vmap(lambda s, rate=rate, beta=beta: infalign.solve(rate, LOG_BASE, beta=beta, start=s))(starts)
        assert (ends.residual < 1e-8).all()
        np.testing.assert_allclose(ends.objective, solved(name).objective, atol=1e-14)


def test_infalign_T5_undamped_iteration_does_not_converge_where_the_solver_does():
    """Plain iteration of (a) and (b) for the best of 2 on a fine base at beta .01 ends in a cycle."""
    log_base, rank = jnp.full(50, -jnp.log(50.0)), np.arange(50)
    procedure, beta = infalign.best_of(2), 0.01
    found = infalign.optimal_reward(log_base, rank=rank, procedure=procedure, beta=beta)
    assert found.residual < 1e-8

    def plain(_, log_policy):
        reward = infalign.win_rate_gradient(jnp.exp(log_policy), base=jnp.exp(log_base), rank=rank, procedure=procedure)
        return gibbs.log_policy(log_base, reward, beta=beta)

    last = jax.lax.fori_loop(0, 3000, plain, log_base)
    assert jnp.abs(plain(0, last) - last).max() > 0.1


def test_infalign_T5_the_fixed_point_of_any_rule():
    """By enumeration: that of best-of-2 is the closed form's; one that keeps the reward's best by a judge, that of the
    joint law; one that keeps the middle of three has no closed form, and its optimum beats what it is compared with."""
    beta = SETTINGS["best of 2"][1]
    best = infalign.keep_best(REWARD)
    rate = lambda prob: infalign.rule_win_rate(prob, base=BASE, rank=RANK, rule=best, n=2)  # noqa: E731
    found = infalign.solve(rate, LOG_BASE, beta=beta)
    np.testing.assert_allclose(found.log_policy, solved("best of 2").log_policy, atol=1e-8)

    judge = np.array([0.0, 2.0, 1.0, 1.0, 3.0, 2.0])
    by_judge = infalign.optimal_reward(
        LOG_BASE, rank=RANK, procedure=infalign.best_of(2), beta=beta, selection_rank=infalign.ranks(judge)
    )
    rate = lambda prob: infalign.rule_win_rate(prob, base=BASE, rank=RANK, rule=infalign.keep_best(judge), n=2)  # noqa: E731
    found = infalign.solve(rate, LOG_BASE, beta=beta)
    assert by_judge.residual < 1e-8
    np.testing.assert_allclose(found.log_policy, by_judge.log_policy, atol=1e-8)

    def middle(drawn):
        order = jnp.argsort(jnp.asarray(RANK)[drawn], axis=-1)
        return jax.nn.one_hot(order[..., 1], 3)

    rate = lambda prob: infalign.rule_win_rate(prob, base=BASE, rank=RANK, rule=middle, n=3)  # noqa: E731
    found = infalign.solve(rate, LOG_BASE, beta=beta)
    assert found.residual < 1e-8
    drawn = jax.nn.log_softmax(2 * np.random.default_rng(1).normal(size=(300, 6)))
    other = jax.vmap(rate)(jnp.exp(drawn)) - beta * gibbs.kl(drawn, LOG_BASE)
    assert (other < found.objective).all()


def test_outcomes_outside_the_base_stay_outside():
    log_base = np.where(np.arange(6) == 2, -np.inf, LOG_BASE)
    found = infalign.optimal_reward(log_base, rank=RANK, procedure=infalign.best_of(2), beta=0.1)
    rest = infalign.optimal_reward(
        np.delete(LOG_BASE, 2), rank=np.delete(RANK, 2), procedure=infalign.best_of(2), beta=0.1
    )
    assert found.residual < 1e-8
    assert np.exp(found.log_policy[2]) == 0
    np.testing.assert_allclose(np.delete(found.log_policy, 2), rest.log_policy, atol=1e-8)


def test_a_rule_is_estimated_without_enumeration():
    """20,000 pairs: within 4.5 deviations of the exact value (1 in 10^5 fails), and an interval of the right width."""
    q, p, reward = random(11, 6)
    rank, rule = infalign.ranks(reward), infalign.keep_best(-reward)
    found = infalign.sampled_win_rate(
        jax.random.key(0), log_prob=jnp.log(q), log_base=jnp.log(p), rank=rank, rule=rule, n=3, pairs=20_000
    )
    expected = infalign.procedure_win_rate(q, base=p, rank=rank, procedure=infalign.worst_of(3))
    assert abs(found.mean - expected) < 4.5 * found.half_width / 1.96
    assert 0.002 < found.half_width < 0.5 * 1.96 / np.sqrt(20_000) * 1.01
    with pytest.raises(ValueError, match="n: expected at most 2\\^20 tuples, found 6\\^10"):
        infalign.rule_win_rate(q, base=p, rank=rank, rule=rule, n=10)
    with pytest.raises(ValueError, match="pairs, n: expected"):
        infalign.sampled_win_rate(jax.random.key(0), log_prob=q, log_base=p, rank=rank, rule=rule, n=3, pairs=1)
    with pytest.raises(ValueError, match="beta: expected"):
        infalign.optimal_reward(LOG_BASE, rank=RANK, procedure=infalign.best_of(2), beta=0.0)

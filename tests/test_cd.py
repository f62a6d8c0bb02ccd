"""Controlled decoding: its exact properties, through our decoders."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, gibbs, losses, tree
from tests import exact

TREE = tree.Tree(4, 4, eos_id=0)
BETAS = (0.1, 0.5, 1.0, 3.0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def level(t: tree.Tree):
    return tree.critic(t, "level")


def q_ref(t, log_ref, reward):
    return tree.q_values(t, tree.value(t, log_ref, reward), reward=reward)


def decoded(t, log_ref, q, beta) -> np.ndarray:
    return exact.tilted_law(t, log_ref, level(t), q, beta=beta)


def test_cd_T2_the_tilt_maximises_the_token_objective():
    """J(pi) = lam·A − D at every state: J at the tilt is log Z, random policies never exceed it, and A >= 0."""
    log_ref, reward = exact.tables(TREE, 0)
    v = tree.value(TREE, log_ref, reward)
    q, alive = tree.q_values(TREE, v, reward=reward), TREE.alive
    for lam in (0.3, 2.0, 10.0):

        def objective(log_policy, lam=lam):
            advantage = gibbs.utility(log_policy, q) - v
            return lam * advantage - gibbs.kl(log_policy, log_ref), advantage

        best, advantage = objective(tree.tilted_policy(log_ref, q, beta=1 / lam))
        log_z = gibbs.log_partition(log_ref, q - v[:, None], beta=1 / lam)
        np.testing.assert_allclose(best[alive], log_z[alive], atol=1e-11)
        assert (advantage[alive] >= -1e-12).all()
        for seed in range(20):
            assert (objective(exact.tables(TREE, seed + 50)[0])[0][alive] <= best[alive] + 1e-12).all()


@pytest.mark.parametrize("lam", [0.2, 1.0, 5.0, 50.0])
def test_cd_T3_the_product_policy_never_loses_reward_and_its_kl_is_bounded(lam):
    for seed in range(5):
        log_ref, reward = exact.tables(TREE, seed)
        law = decoded(TREE, log_ref, q_ref(TREE, log_ref, reward), 1 / lam)
        gain = float(np.exp(law) @ np.asarray(reward)) - float(tree.value(TREE, log_ref, reward)[0])
        kl = exact.kl(law, np.asarray(tree.response_log_prob(TREE, log_ref)))
        assert gain >= -1e-12
        assert kl <= lam * gain + 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_cd_T4_exact_at_one_step_and_not_beyond_where_the_soft_value_is(beta):
    single = tree.Tree(6, 1, eos_id=None)
    log_ref, reward = exact.tables(single, 1)
    law = decoded(single, log_ref, q_ref(single, log_ref, reward), beta)
    np.testing.assert_allclose(law, exact.gibbs_law(log_ref[0], reward, beta), atol=1e-12)

    log_ref, reward = exact.tables(TREE, 1)
    target = exact.gibbs_law(tree.response_log_prob(TREE, log_ref), reward, beta)
    assert exact.total_variation(decoded(TREE, log_ref, q_ref(TREE, log_ref, reward), beta), target) > 1e-3
    soft = tree.q_values(TREE, tree.soft_value(TREE, log_ref, reward, beta=beta), reward=reward)
    assert exact.total_variation(decoded(TREE, log_ref, soft, beta), target) < 1e-11


def two_branches(p_left: float = 0.3):
    """Left pays 0.1 surely; right pays 1 with probability 0.05 under the base, else 0."""
    t = tree.Tree(2, 2, eos_id=None)
    log_ref = jnp.log(jnp.array([[p_left, 1 - p_left], [0.5, 0.5], [0.95, 0.05]]))
    reward = jnp.array([0.1, 0.1, 0.0, 1.0])
    tokens, _ = t.responses
    assert tokens.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    return t, log_ref, reward


TWO_BRANCH_REWARDS = [(2, 0.222, 0.229), (10, 0.627, 0.998), (50, 0.245, 1.0), (200, 0.100, 1.0)]


@pytest.mark.parametrize(("lam", "cd", "soft"), TWO_BRANCH_REWARDS)
def test_cd_T5_two_branch_numbers(lam, cd, soft):
    t, log_ref, reward = two_branches()
    law = decoded(t, log_ref, q_ref(t, log_ref, reward), 1 / lam)
    np.testing.assert_allclose(np.exp(law) @ reward, cd, atol=5e-4)
    q_soft = tree.q_values(t, tree.soft_value(t, log_ref, reward, beta=1 / lam), reward=reward)
    np.testing.assert_allclose(np.exp(decoded(t, log_ref, q_soft, 1 / lam)) @ reward, soft, atol=5e-4)


def test_cd_T5_at_equal_kl_the_gibbs_policy_earns_at_least_as_much():
    for seed in range(5):
        log_ref, reward = exact.tables(TREE, seed)
        log_base = tree.response_log_prob(TREE, log_ref)
        q = q_ref(TREE, log_ref, reward)
        for lam in (0.5, 2.0, 8.0):
            law = decoded(TREE, log_ref, q, 1 / lam)
            beta = gibbs.match_kl(log_base, reward, kl=exact.kl(law, np.asarray(log_base)))
            best = gibbs.utility(gibbs.log_policy(log_base, reward, beta=beta), reward)
            assert float(best) >= float(np.exp(law) @ np.asarray(reward)) - 1e-10


def test_cd_T7_fudge_reaches_the_value_of_the_policy_that_drew_the_data():
    """The minimiser of the expected FUDGE loss in a table is V of the behaviour policy, and its expected gradient is
    that of the squared error to it."""
    behaviour, reward = exact.tables(TREE, 2)
    other = exact.tables(TREE, 3)[0]
    tokens, mask = exact.responses(TREE)
    law = jnp.exp(tree.response_log_prob(TREE, behaviour))
    reach = jnp.exp(tree.state_log_prob(TREE, behaviour)[:, None] + behaviour)

    def expected_loss(table):
        value = table[jnp.asarray(TREE.nodes), tokens]  # v([x, y_1..y_t]) as Q of the state before
        each = jax.vmap(lambda v, r, m: losses.fudge(v[None], reward=r[None], mask=m[None]))(value, reward, mask)
        return law @ each

    truth = q_ref(TREE, behaviour, reward)
    gradient = jax.grad(expected_loss)
    np.testing.assert_allclose(gradient(truth), 0, atol=1e-12)
    table = exact.tables(TREE, 4)[0]
    np.testing.assert_allclose(gradient(table)[TREE.alive], (reach * (table - truth))[TREE.alive], atol=1e-12)
    # Drawn by another policy it is another value.
    assert float(jnp.abs(gradient(q_ref(TREE, other, reward))).max()) > 1e-3


def cd_q_batch(table, log_ref, tokens, mask):
    nodes = jnp.asarray(TREE.nodes)
    value = table[nodes, tokens]
    following = jnp.pad(nodes[:, 1:], ((0, 0), (0, 1)))
    expected = losses.expected_next(table[following], log_prob_ref=log_ref[following])
    return value, expected


def test_cd_T8_cd_q_reaches_the_base_value_for_any_data_in_as_many_sweeps_as_steps():
    """Data: every response once, a law that no policy of ours has. Exact regression on the targets, T times."""
    log_ref, reward = exact.tables(TREE, 5)
    tokens, mask = exact.responses(TREE)
    truth = q_ref(TREE, log_ref, reward)
    count = jnp.zeros_like(truth).at[jnp.asarray(TREE.nodes), tokens].add(mask)

    def loss(table):
        value, expected = cd_q_batch(table, log_ref, tokens, mask)
        return losses.cd_q(value, expected=expected, reward=reward, mask=mask) * len(tokens)

    table = jnp.zeros_like(truth)
    for sweep in range(TREE.horizon):
        assert float(jnp.abs(table - truth)[TREE.alive].max()) > 1e-6, sweep
        # One Newton step of the semi-gradient is exact: the loss is quadratic with curvature = visit count.
        table = table - jnp.where(count > 0, jax.grad(loss)(table) / jnp.maximum(count, 1), 0)
    np.testing.assert_allclose(table[TREE.alive], truth[TREE.alive], atol=1e-12)
    np.testing.assert_allclose(jax.grad(loss)(truth), 0, atol=1e-10)


def test_cd_T8_one_trajectory_is_not_enough():
    log_ref, reward = exact.tables(TREE, 5)
    tokens, mask = exact.responses(TREE)
    longest = int(mask.sum(1).argmax())
    row = slice(longest, longest + 1)

    def loss(table):
        nodes = jnp.asarray(TREE.nodes)[row]
        following = jnp.pad(nodes[:, 1:], ((0, 0), (0, 1)))
        expected = losses.expected_next(table[following], log_prob_ref=log_ref[following])
        return losses.cd_q(table[nodes, tokens[row]], expected=expected, reward=reward[row], mask=mask[row])

    table = jnp.zeros((TREE.num_states, TREE.vocab_size))
    step = jax.jit(lambda table: table - jax.grad(loss)(table))
    for _ in range(200):
        table = step(table)
    first = tokens[longest, 0]
    assert abs(float(table[0, first] - q_ref(TREE, log_ref, reward)[0, first])) > 0.05


def test_cd_T9_the_target_is_stopped_and_sampled_successors_bias_the_full_gradient():
    """At the exact value the semi-gradient vanishes in expectation; a gradient through a sampled target does not."""
    log_ref, reward = exact.tables(TREE, 6)
    tokens, mask = exact.responses(TREE)
    law = jnp.exp(tree.response_log_prob(TREE, log_ref))
    truth = q_ref(TREE, log_ref, reward)

    def expected_td(table, stop):
        value = table[jnp.asarray(TREE.nodes), tokens]

        def each(v, r, m):
            if stop:
                return losses.td(v[None], reward=r[None], mask=m[None])
            last = m & ~jnp.pad(m[1:], (0, 1))
            target = jnp.where(last, r, jnp.pad(v[1:], (0, 1)))
            return 0.5 * (m * (v - target) ** 2).sum()

        return law @ jax.vmap(each)(value, reward, mask)

    np.testing.assert_allclose(jax.grad(expected_td)(truth, True), 0, atol=1e-12)
    assert float(jnp.abs(jax.grad(expected_td)(truth, False)).max()) > 1e-2
    # The target of CD-Q takes no gradient: the one through `expected` is zero.
    value, expected = cd_q_batch(truth + 0.1, log_ref, tokens, mask)
    gradient = jax.grad(lambda e: losses.cd_q(value, expected=e, reward=reward, mask=mask))(expected)
    np.testing.assert_array_equal(gradient, 0)


def test_cd_T11_weighted_values_are_the_value_of_the_weighted_reward():
    """Linear for V_ref, through `critics.weighted_sum`; false for V_soft."""
    log_ref, first = exact.tables(TREE, 7)
    second = exact.tables(TREE, 8)[1]
    weights = jnp.array([0.7, -1.2])
    joint = decoded(TREE, log_ref, q_ref(TREE, log_ref, weights[0] * first + weights[1] * second), 0.5)
    critic = critics.weighted_sum([level(TREE), level(TREE)])
    params = {"critics": [q_ref(TREE, log_ref, first), q_ref(TREE, log_ref, second)], "weights": weights}
    found = exact.tilted_law(TREE, log_ref, critic, params, beta=0.5)
    np.testing.assert_allclose(found, joint, atol=1e-12)

    def soft(reward):
        return tree.soft_value(TREE, log_ref, reward, beta=0.5)

    mixed = soft(weights[0] * first + weights[1] * second)
    assert float(jnp.abs(mixed - weights[0] * soft(first) - weights[1] * soft(second))[0]) > 0.01


def test_cd_T13_reward_is_not_monotone_in_the_weight():
    t, log_ref, reward = two_branches()
    q = q_ref(t, log_ref, reward)
    earned = [float(np.exp(decoded(t, log_ref, q, 1 / lam)) @ reward) for lam in (2, 10, 50, 200)]
    assert earned[0] < earned[1] > earned[2] > earned[3]
    kl = exact.kl(decoded(t, log_ref, q, 1 / 2000), np.asarray(tree.response_log_prob(t, log_ref)))
    np.testing.assert_allclose(kl, np.log(1 / 0.3), atol=1e-6)
    q_soft = tree.q_values(t, tree.soft_value(t, log_ref, reward, beta=1 / 2000), reward=reward)
    kl = exact.kl(decoded(t, log_ref, q_soft, 1 / 2000), np.asarray(tree.response_log_prob(t, log_ref)))
    np.testing.assert_allclose(kl, np.log(1 / 0.7) + np.log(20), atol=1e-6)


def trained(loss, start, steps: int = 60):
    """The minimiser of a convex loss that is a sum over table entries: Newton's method with the diagonal curvature,
    which climbs to that of the linex loss from below."""
    table = jnp.full((TREE.num_states, TREE.vocab_size), start)
    ones = jnp.ones_like(table)

    @jax.jit
    def step(table):
        gradient, curvature = jax.jvp(jax.grad(loss), (table,), (ones,))
        return table - jnp.where(curvature > 0, gradient / jnp.where(curvature > 0, curvature, 1), 0)

    for _ in range(steps):
        table = step(table)
    return table


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_cd_training_the_soft_value_gives_the_gibbs_policy_and_the_plain_value_does_not(beta):
    """Both losses to convergence, their expectation exact over all responses of the base."""
    log_ref, reward = exact.tables(TREE, 9)
    tokens, mask = exact.responses(TREE)
    log_base = tree.response_log_prob(TREE, log_ref)
    target = exact.gibbs_law(log_base, reward, beta)

    def expected(each):
        """E_ref of a loss over single responses, of a table Q(s,z) read at the tokens drawn."""

        def loss(table):
            value = table[jnp.asarray(TREE.nodes), tokens]
            return jnp.exp(log_base) @ jax.vmap(lambda v, r, m: each(v[None], reward=r[None], mask=m[None]))(
                value, reward, mask
            )

        return loss

    soft = trained(expected(functools.partial(losses.soft_value, beta=beta)), reward.min())
    np.testing.assert_allclose(np.exp(decoded(TREE, log_ref, soft, beta)), np.exp(target), atol=1e-4)
    truth = tree.q_values(TREE, tree.soft_value(TREE, log_ref, reward, beta=beta), reward=reward)
    np.testing.assert_allclose(soft[TREE.alive], truth[TREE.alive], atol=1e-4)
    plain = trained(expected(losses.fudge), 0.0)
    np.testing.assert_allclose(plain[TREE.alive], q_ref(TREE, log_ref, reward)[TREE.alive], atol=1e-9)
    assert exact.total_variation(decoded(TREE, log_ref, plain, beta), target) > 0.02

"""Transfer Q*: inequalities, the bias of few roll-outs, and the limits of the decoder (Q7 to Q12), in float64."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, tree
from tests import exact
from tests.test_transfer_q import (
    BETAS,
    TREE,
    assert_within,
    by_enumeration,
    decoded,
    direct,
    indirect,
    rows,
    scores,
    transfer_table,
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def expected_step_kl(log_alg, log_baseline, log_ref) -> float:
    """Σ_t E_{s_t~alg} KL(baseline(·|s_t)‖ref(·|s_t))."""
    reach = jnp.exp(tree.state_log_prob(TREE, log_alg))
    each = (jnp.exp(log_baseline) * (log_baseline - log_ref)).sum(axis=-1)
    return float(jnp.where(TREE.alive, reach * each, 0).sum())


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_transfer_q_Q7_provable_inequalities(beta):
    for seed, beta_dec in itertools.product(range(4), (0.05, 0.5, 5.0)):
        log_ref, reward = exact.tables(TREE, seed)
        base = np.asarray(tree.response_log_prob(TREE, log_ref))
        baseline = tree.optimal_policy(TREE, log_ref, reward, beta=beta)
        law_bl = np.asarray(tree.response_log_prob(TREE, baseline))
        q = transfer_table(TREE, log_ref, reward, beta)
        alg = decoded(TREE, log_ref, q, beta_dec)
        r = np.asarray(reward)
        gain = np.exp(alg) @ r - np.exp(law_bl) @ r
        kept = expected_step_kl(tree.tilted_policy(log_ref, q, beta=beta_dec), baseline, log_ref)
        assert gain >= beta_dec * (exact.kl(alg, base) - kept) - 1e-10  # (a)
        for other in (alg, np.asarray(tree.response_log_prob(TREE, exact.tables(TREE, seed + 60)[0]))):
            better = np.exp(other) @ r - np.exp(law_bl) @ r
            assert better <= beta * (exact.kl(other, base) - exact.kl(law_bl, base)) + 1e-10  # (b)


FLAT = tree.Tree(3, 2, eos_id=None)


def self_normalised_mean(p, r, w, n) -> float:
    """The exact expectation of Σ w·r/Σ w over n draws of p, by enumeration of the counts."""
    total = 0.0
    for counts in itertools.product(range(n + 1), repeat=len(p)):
        if sum(counts) == n:
            c = np.array(counts)
            ways = math.factorial(n) / math.prod(math.factorial(k) for k in counts)
            total += ways * float(np.prod(p**c)) * float((c * w * r).sum() / (c * w).sum())
    return total


def test_transfer_q_Q8_bias_of_one_over_n():
    """The estimate's mean over 4000 streams is the enumerated one, whose bias falls as 1/n."""
    baseline, reward = exact.tables(FLAT, 13)
    other, beta, count = exact.tables(FLAT, 14)[1], 0.9, 4000
    w_all = np.exp(np.asarray(reward - other) / beta)
    leaves = FLAT.leaf[1]  # below token 0
    p, r, w = np.exp(np.asarray(baseline[1])), np.asarray(reward)[leaves], w_all[leaves]
    truth = (p * w * r).sum() / (p * w).sum()
    params = {"baseline": baseline, "reward": reward, "baseline_reward": other, "beta": jnp.asarray(beta)}
    expected = {n: self_normalised_mean(p, r, w, n) for n in (1, 2, 4, 8, 16)}
    nothing, first = jnp.zeros((count, 0), jnp.int32), jnp.zeros((count, 1), jnp.int32)
    found = np.asarray(scores(FLAT, indirect(FLAT, 2), params, rows(count), nothing, first)[0][:, 0])
    error = found.std() / math.sqrt(count)
    assert_within(found.mean(), expected[2], error)
    assert abs(found.mean() - truth) > 5 * error
    bias = [value - truth for value in expected.values()]
    assert abs(bias[0]) > 0.05
    np.testing.assert_allclose(bias[-1] / bias[-2], 0.5, atol=0.05)
    assert all(abs(late) < abs(early) for early, late in itertools.pairwise(bias))


def test_transfer_q_Q8_the_effective_sample_falls_as_the_rewards_part():
    baseline, reward = exact.tables(FLAT, 13)
    other = exact.tables(FLAT, 14)[1]
    beta = jnp.repeat(jnp.array([100.0, 3.0, 1.0, 0.3, 0.01]), 200)  # per prompt
    params = {"baseline": baseline, "reward": reward, "baseline_reward": other, "beta": beta}
    nothing = jnp.zeros((len(beta), 0), jnp.int32)
    _, proposal = scores(FLAT, indirect(FLAT, 16), params, rows(len(beta)), nothing)
    effective = np.asarray(critics.effective_rollouts(proposal))
    assert effective.shape == (1000, 3)
    assert effective.min() >= 1 - 1e-9
    assert effective.max() <= 16 + 1e-9
    mean = effective.reshape(5, 200, 3).mean(axis=1)
    assert (np.diff(mean, axis=0) < 0).all()
    np.testing.assert_allclose(mean[0], 16, rtol=0.01)
    # Draws of the best response are equal: as many as came up, however small beta.
    assert mean[-1].min() < 8


def test_transfer_q_Q9_limits_of_the_decoders_weight():
    for seed in range(5):
        log_ref, reward = exact.tables(TREE, seed)
        baseline = exact.tables(TREE, seed + 20)[0]
        q = tree.q_values(TREE, tree.value(TREE, baseline, reward), reward=reward)
        earned = np.exp(decoded(TREE, log_ref, q, 1e-3)) @ np.asarray(reward)
        assert earned >= float(tree.value(TREE, baseline, reward)[0]) - 1e-10
    found = exact.tilted_law(TREE, log_ref, direct(TREE, 3), {"baseline": baseline, "reward": reward}, beta=1e10)
    np.testing.assert_allclose(found, tree.response_log_prob(TREE, log_ref), atol=1e-8)


def test_transfer_q_Q10_a_constant_in_the_reward_changes_nothing():
    log_ref, reward = exact.tables(TREE, 15)
    other = exact.tables(TREE, 16)[1]
    baseline = tree.optimal_policy(TREE, log_ref, other, beta=0.8)

    def laws(added):
        params = {"baseline": baseline, "reward": reward + added}
        weighted = params | {"baseline_reward": other, "beta": jnp.asarray(0.8)}
        plain = exact.tilted_law(TREE, log_ref, direct(TREE, 3), params, beta=0.5)
        return plain, exact.tilted_law(TREE, log_ref, indirect(TREE, 3), weighted, beta=0.5)

    for before, after in zip(laws(0.0), laws(-4.0), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-10)
    # The released formula, exp((r − r_BL)/2)·r without a normaliser, is not so: regression.
    law = np.asarray(tree.response_log_prob(TREE, baseline))

    def released(added):
        r = np.asarray(reward) + added
        q = by_enumeration(TREE, law, np.exp(0.5 * (r - np.asarray(other))) * r)
        return decoded(TREE, log_ref, jnp.asarray(q), 0.5)

    assert exact.total_variation(released(0.0), released(-4.0)) > 0.1


@pytest.mark.parametrize("beta", BETAS)
def test_transfer_q_Q11_not_the_optimum_beyond_one_step(beta):
    """The tilt by V_TQ is not pi*_beta; the tilt by V_soft is."""
    log_ref, reward = exact.tables(TREE, 20)
    base = np.asarray(tree.response_log_prob(TREE, log_ref))
    target = exact.gibbs_law(base, reward, beta)
    law = decoded(TREE, log_ref, transfer_table(TREE, log_ref, reward, beta), beta)
    assert exact.total_variation(law, target) > 1e-3
    soft = tree.q_values(TREE, tree.soft_value(TREE, log_ref, reward, beta=beta), reward=reward)
    assert exact.total_variation(decoded(TREE, log_ref, soft, beta), target) < 1e-11


def test_transfer_q_Q12_interpolated_policies():
    """beta·log(pi_BL/pi_ref) is the soft advantage, so pi_ref^{1-g}·pi_BL^g is pi* at g = 1, and not pi*_{beta/g}."""
    beta = 0.7
    for t in (TREE, tree.Tree(4, 1, eos_id=None)):
        log_ref, reward = exact.tables(t, 18)
        baseline = tree.optimal_policy(t, log_ref, reward, beta=beta)
        soft = tree.soft_value(t, log_ref, reward, beta=beta)
        advantage = tree.q_values(t, soft, reward=reward) - soft[:, None]
        np.testing.assert_allclose((beta * (baseline - log_ref))[t.alive], advantage[t.alive], atol=1e-11)
        base = tree.response_log_prob(t, log_ref)
        ratio = tree.critic(t, "increment")
        for g in (0.4, 1.0, 2.0):
            law = exact.tilted_law(t, log_ref, ratio, baseline - log_ref, beta=1 / g)
            distance = exact.total_variation(law, exact.gibbs_law(base, reward, beta / g))
            assert distance < 1e-11 if g == 1 or t.horizon == 1 else distance > 1e-3

"""Transfer Q*: its exact properties, Q1 to Q6, by the critic's roll-outs."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, tree
from jaxalign._arrays import NEGATIVE
from jaxalign.types import Critic, StepOutput, TokenBatch
from tests import exact

TREE = tree.Tree(3, 3, eos_id=0)
BETAS = (0.1, 0.5, 1.0, 3.0)
RNG = jax.random.key(0)
MANY = 4000


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def direct(t: tree.Tree, rollouts: int) -> Critic:
    eos = () if t.eos_id is None else (t.eos_id,)
    return critics.transfer_q(tree.policy(t), tree.reward(t), eos_ids=eos, num_samples=rollouts)


@functools.cache
def indirect(t: tree.Tree, rollouts: int) -> Critic:
    eos = () if t.eos_id is None else (t.eos_id,)
    reward = tree.reward(t)
    return critics.transfer_q(tree.policy(t), reward, eos_ids=eos, num_samples=rollouts, baseline_reward=reward)


def rows(count: int, index: int | None = None) -> TokenBatch:
    """Dummy prompts with a stream each, or all with that of `index`."""
    numbers = jnp.arange(count, dtype=jnp.int32) if index is None else jnp.full(count, index, jnp.int32)
    return TokenBatch(jnp.ones((count, 2), jnp.int32), jnp.ones((count, 2), bool), numbers)


@functools.partial(jax.jit, static_argnums=(0, 1))
def scores(t: tree.Tree, critic: Critic, params, prompts, prefix, candidates=None):
    """(q, proposal) after the prefixes [B,D] (-1: no token), reached by `advance`."""
    state = critic.init(params, RNG, prompts, t.horizon)
    for d in range(prefix.shape[1]):
        state = critic.advance(params, state, prefix[:, d])
    none = jnp.zeros(prefix.shape[:1])
    table = jnp.zeros((prefix.shape[0], t.vocab_size))
    return critic.score(params, RNG, state, StepOutput(table, table, none), candidates)


def prefixes(t: tree.Tree) -> tuple[np.ndarray, np.ndarray]:
    """(live states [N], their prefixes [N,T-1], -1 after the end)."""
    states = np.flatnonzero(t.alive)
    out = np.full((len(states), t.horizon - 1), -1, np.int32)
    for row, state in zip(out, states, strict=True):
        path: list[int] = []
        while state > 0:
            path.insert(0, (state - 1) % t.vocab_size)
            state = (state - 1) // t.vocab_size
        row[: len(path)] = path
    return states, out


def at_all_states(t: tree.Tree, critic: Critic, params) -> tuple[np.ndarray, np.ndarray]:
    """(live states, q [N,V]) by the critic."""
    states, prefix = prefixes(t)
    return states, np.asarray(scores(t, critic, params, rows(len(states)), jnp.asarray(prefix))[0])


def by_enumeration(t: tree.Tree, log_law: np.ndarray, f: np.ndarray) -> np.ndarray:
    """E[f | s,z] [S,V] of a law over responses, as a sum over all of them; 0 where none goes through."""
    mass, total = np.zeros((2, t.num_states, t.vocab_size))
    tokens, mask = t.responses
    for y, p in enumerate(np.exp(log_law)):
        for step in np.flatnonzero(mask[y]):
            mass[t.nodes[y, step], tokens[y, step]] += p
            total[t.nodes[y, step], tokens[y, step]] += p * f[y]
    return np.where(mass > 0, total / np.where(mass > 0, mass, 1), 0)


def transfer_table(t, log_ref, reward, beta) -> jax.Array:
    return tree.q_values(t, tree.transfer_value(t, log_ref, reward, beta=beta), reward=reward)


def decoded(t, log_ref, q, beta) -> np.ndarray:
    return exact.tilted_law(t, log_ref, tree.critic(t, "level"), q, beta=beta)


def deterministic(t: tree.Tree, log_policy) -> jax.Array:
    """The policy's most probable token in each state, surely."""
    best = jnp.argmax(log_policy, axis=-1)
    return jnp.where(jnp.arange(t.vocab_size) == best[:, None], 0.0, NEGATIVE)


def assert_within(found, truth, error) -> None:
    """At most 5 standard errors off: for Gaussian errors 6e-7 a comparison."""
    assert (np.abs(found - truth) <= 5 * error + 1e-9).all(), np.abs(found - truth).max()


def test_transfer_q_Q1_roll_outs_enumeration_and_backward_induction_agree():
    log_ref, reward = exact.tables(TREE, 0)
    baseline = tree.optimal_policy(TREE, log_ref, reward, beta=0.7)
    truth = tree.q_values(TREE, tree.value(TREE, baseline, reward), reward=reward)
    np.testing.assert_allclose(truth, transfer_table(TREE, log_ref, reward, 0.7), atol=1e-12)
    law = np.asarray(tree.response_log_prob(TREE, baseline))
    r = np.asarray(reward)
    enumerated, squares = by_enumeration(TREE, law, r), by_enumeration(TREE, law, r**2)
    states, found = at_all_states(TREE, direct(TREE, MANY), {"baseline": baseline, "reward": reward})
    np.testing.assert_allclose(enumerated[states], truth[states], atol=1e-12)
    deviation = np.sqrt(np.maximum(squares - enumerated**2, 0))[states]
    assert (deviation > 0.05).any()
    assert_within(found, enumerated[states], deviation / math.sqrt(MANY))
    # A candidate that ends the text is scored as it is, without noise.
    ends = TREE.leaf[states] >= 0
    assert ends.any()
    np.testing.assert_allclose(found[ends], enumerated[states][ends], atol=1e-12)


def test_transfer_q_Q1_exact_for_a_deterministic_baseline():
    reward = exact.tables(TREE, 1)[1]
    baseline = deterministic(TREE, exact.tables(TREE, 2)[0])
    truth = tree.q_values(TREE, tree.value(TREE, baseline, reward), reward=reward)
    states, found = at_all_states(TREE, direct(TREE, 1), {"baseline": baseline, "reward": reward})
    np.testing.assert_allclose(found, truth[states], atol=1e-12)


def test_transfer_q_Q1_a_tilted_policy_as_the_baseline():
    """The tilt by the exact soft value is pi*: the same draws, so the same estimate, as from its table."""
    log_ref, reward = exact.tables(TREE, 3)
    soft = tree.q_values(TREE, tree.soft_value(TREE, log_ref, reward, beta=0.6), reward=reward)
    tilted = exact.tilt(TREE, tree.critic(TREE, "level"))
    critic = critics.transfer_q(tilted, tree.reward(TREE), eos_ids=(0,), num_samples=20)
    params = {"baseline": {"policy": log_ref, "critic": soft, "beta": jnp.asarray(0.6)}, "reward": reward}
    _, found = at_all_states(TREE, critic, params)
    table = tree.optimal_policy(TREE, log_ref, reward, beta=0.6)
    _, expected = at_all_states(TREE, direct(TREE, 20), {"baseline": table, "reward": reward})
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_transfer_q_Q2_order_of_the_values_and_the_kl_of_the_future(beta):
    for seed in range(3):
        log_ref, reward = exact.tables(TREE, seed)
        alive = TREE.alive
        low = tree.value(TREE, log_ref, reward)[alive]
        soft = tree.soft_value(TREE, log_ref, reward, beta=beta)[alive]
        high = tree.transfer_value(TREE, log_ref, reward, beta=beta)[alive]
        top = tree.max_value(TREE, log_ref, reward)[alive]
        assert (low <= soft + 1e-12).all()
        assert (soft <= high + 1e-12).all()
        assert (high <= top + 1e-12).all()
        optimal = tree.optimal_policy(TREE, log_ref, reward, beta=beta)
        ratio = tree.response_log_prob(TREE, optimal) - tree.response_log_prob(TREE, log_ref)
        before = tree.state_log_prob(TREE, optimal) - tree.state_log_prob(TREE, log_ref)
        # E[log-ratio of the whole response | s] less the log-ratio of the prefix.
        future = tree.value(TREE, optimal, ratio)[alive] - before[alive]
        np.testing.assert_allclose(high - soft, beta * future, atol=1e-10)
        assert float(future.max()) > 1e-4


def test_transfer_q_Q3_a_wide_beta_gives_controlled_decoding():
    log_ref, reward = exact.tables(TREE, 4)
    cd = tree.q_values(TREE, tree.value(TREE, log_ref, reward), reward=reward)
    wide = transfer_table(TREE, log_ref, reward, 1e8)
    np.testing.assert_allclose(wide[TREE.alive], cd[TREE.alive], atol=1e-7)
    np.testing.assert_allclose(decoded(TREE, log_ref, wide, 0.5), decoded(TREE, log_ref, cd, 0.5), atol=1e-6)
    assert exact.total_variation(decoded(TREE, log_ref, transfer_table(TREE, log_ref, reward, 0.5), 0.5),
                                 decoded(TREE, log_ref, cd, 0.5)) > 1e-3  # fmt: skip
    # The critic with the base as its baseline: every log-probability is off by at most the errors of its q.
    params = {"baseline": log_ref, "reward": reward}
    found = exact.tilted_law(TREE, log_ref, direct(TREE, MANY), params, beta=0.5)
    error = 5 * float(reward.std()) / math.sqrt(MANY) / 0.5
    np.testing.assert_allclose(found, decoded(TREE, log_ref, cd, 0.5), atol=2 * 3 * error)
    assert exact.total_variation(found, decoded(TREE, log_ref, cd, 0.5)) < error


def test_transfer_q_Q3_a_narrow_beta_gives_the_largest_reward():
    """Also through the critic: the baseline is then the greedy optimum, one roll-out is exact, and so is the law."""
    log_ref, reward = exact.tables(TREE, 5)
    best = tree.max_value(TREE, log_ref, reward)
    narrow = tree.transfer_value(TREE, log_ref, reward, beta=1e-4)
    np.testing.assert_allclose(narrow[TREE.alive], best[TREE.alive], atol=1e-6)
    baseline = deterministic(TREE, tree.optimal_policy(TREE, log_ref, reward, beta=1e-4))
    found = exact.tilted_law(TREE, log_ref, direct(TREE, 1), {"baseline": baseline, "reward": reward}, beta=0.8)
    expected = decoded(TREE, log_ref, tree.q_values(TREE, best, reward=reward), 0.8)
    np.testing.assert_allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("beta", BETAS)
def test_transfer_q_Q4_exact_at_one_step(beta):
    single = tree.Tree(6, 1, eos_id=None)
    log_ref, reward = exact.tables(single, 6)
    params = {"baseline": exact.tables(single, 7)[0], "reward": reward}
    found = exact.tilted_law(single, log_ref, direct(single, 1), params, beta=beta)
    np.testing.assert_allclose(found, exact.gibbs_law(log_ref[0], reward, beta), atol=1e-12)


def test_transfer_q_Q5_the_targets_own_baseline_makes_indirect_transfer_direct():
    log_ref, reward = exact.tables(TREE, 8)
    baseline = tree.optimal_policy(TREE, log_ref, reward, beta=0.4)
    params = {"baseline": baseline, "reward": reward}
    both = params | {"baseline_reward": reward, "beta": jnp.asarray(0.4)}
    states, prefix = prefixes(TREE)
    prefix, prompts = jnp.asarray(prefix), rows(len(states))
    expected, plain = scores(TREE, direct(TREE, 20), params, prompts, prefix)
    found, proposal = scores(TREE, indirect(TREE, 20), both, prompts, prefix)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(critics.effective_rollouts(proposal), 20, rtol=1e-12)
    np.testing.assert_array_equal(critics.effective_rollouts(plain), 20)


def weighted_truth(t, baseline, reward, baseline_reward, beta, n):
    """(E_BL[w·r|s,z]/E_BL[w|s,z], standard error of its self-normalised estimate from n draws), [S,V] each."""
    law = np.asarray(tree.response_log_prob(t, baseline))
    r, w = np.asarray(reward), np.exp((np.asarray(reward) - np.asarray(baseline_reward)) / beta)
    mean = by_enumeration(t, law, w)
    mean = np.where(mean > 0, mean, 1)
    q = by_enumeration(t, law, w * r) / mean
    second = [by_enumeration(t, law, w**2 * r**k) for k in range(3)]
    variance = (second[2] - 2 * q * second[1] + q**2 * second[0]) / mean**2
    return q, np.sqrt(np.maximum(variance, 0) / n)


@pytest.mark.parametrize("name", ["Q5_no_reward", "Q6_another_reward"])
def test_transfer_q_Q5_Q6_weights_give_the_targets_value_at_every_prefix(name):
    """Q5: r_BL = 0, the baseline is the base. Q6: any r_BL. The weighted mean is E_{pi*}[r|sz] in the limit."""
    log_ref, reward = exact.tables(TREE, 9)
    other = jnp.zeros_like(reward) if name.startswith("Q5") else exact.tables(TREE, 10)[1]
    beta = 1.3
    baseline = tree.optimal_policy(TREE, log_ref, other, beta=beta)
    truth = np.asarray(transfer_table(TREE, log_ref, reward, beta))
    enumerated, error = weighted_truth(TREE, baseline, reward, other, beta, MANY)
    params = {"baseline": baseline, "reward": reward, "baseline_reward": other, "beta": jnp.asarray(beta)}
    states, found = at_all_states(TREE, indirect(TREE, MANY), params)
    np.testing.assert_allclose(enumerated[states], truth[states], atol=1e-12)
    assert error[states].max() > 1e-3
    assert_within(found, truth[states], error[states])
    # Without weights it is the baseline's value, which is another.
    plain = np.asarray(tree.q_values(TREE, tree.value(TREE, baseline, reward), reward=reward))
    assert np.abs(plain - truth)[states].max() > 10 * error[states].max()


def test_transfer_q_Q6_one_normaliser_for_all_prefixes_fails():
    """E_BL[w·r|sz]/E_BL[w] is the value times pi*(prefix)/pi_BL(prefix); E_BL[w|sz] alone gives pi* from pi_BL."""
    log_ref, reward = exact.tables(TREE, 11)
    other, beta = exact.tables(TREE, 12)[1], 0.8
    baseline = tree.optimal_policy(TREE, log_ref, other, beta=beta)
    optimal = tree.optimal_policy(TREE, log_ref, reward, beta=beta)
    law = np.asarray(tree.response_log_prob(TREE, baseline))
    r, w = np.asarray(reward), np.exp(np.asarray(reward - other) / beta)
    per_state = by_enumeration(TREE, law, w)
    z = float(np.exp(law) @ w)
    ratio = np.exp(
        np.asarray(tree.state_log_prob(TREE, optimal) - tree.state_log_prob(TREE, baseline))[:, None]
        + np.asarray(optimal - baseline)
    )
    truth, alive = np.asarray(transfer_table(TREE, log_ref, reward, beta)), TREE.alive
    globally = by_enumeration(TREE, law, w * r) / z
    np.testing.assert_allclose(globally[alive], (truth * ratio)[alive], atol=1e-12)
    assert np.abs(globally - truth)[alive].max() > 0.05
    recipe = jax.nn.log_softmax(baseline + jnp.log(np.where(per_state > 0, per_state, 1)))
    np.testing.assert_allclose(recipe[alive], optimal[alive], atol=1e-12)

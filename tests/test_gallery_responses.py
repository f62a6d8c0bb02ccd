"""The methods of examples/gallery that choose among whole responses: laws of n-tuples, and draws against them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import mdp, policies, tree
from tests import exact
from tests.gallery_files import (
    BASE,
    FROM_ONE,
    LEVEL,
    ONE,
    REWARD_ONE,
    TREE,
    P,
    R,
    assert_law,
    drawn,
    exact_last,
    law,
    module,
    normalised,
    tables,
)
from tests.sampling import assert_mean, index_of

__all__ = ["tables"]  # a fixture


def of_tuples(p, weight, n):
    """The law of the one of n independent draws of p that is picked by weight(tuple) [n]."""
    found = np.zeros(len(p))
    for each in itertools.product(range(len(p)), repeat=n):
        w = weight(np.array(each))
        np.add.at(found, np.array(each), np.prod(p[list(each)]) * w / w.sum())
    return found


@pytest.mark.parametrize(("n", "expected"), [(2, [0.354523, 0.341591, 0.303886]), (3, [0.293308, 0.343186, 0.363506])])
def test_soft_best_of_n(n, expected):
    np.testing.assert_allclose(of_tuples(P, lambda i: np.exp(R[i]), n), expected, atol=1e-6)
    params = {"policy": jnp.log(P)[None], "reward": jnp.asarray(R), "beta": 1.0}
    found = drawn(lambda *a, **k: module("soft_best_of_n").method(FROM_ONE, REWARD_ONE, params, *a, n, **k), ONE)
    assert_law(found.completions, np.log(expected), ONE, most=18)


def test_guided_draft():
    draft, expected = np.array([0.2, 0.3, 0.5]), [0.189139, 0.296235, 0.514626]
    np.testing.assert_allclose(of_tuples(draft, lambda i: P[i] / draft[i] * np.exp(R[i]), 2), expected, atol=1e-6)
    both = policies.ReferenceParams(jnp.log(draft)[None], jnp.log(P)[None])
    params = {"policy": both, "reward": jnp.asarray(R), "beta": 1.0}
    build = module("guided_draft").method
    found = drawn(lambda *a, **k: build(FROM_ONE, FROM_ONE, REWARD_ONE, params, *a, 2, **k), ONE)
    assert_law(found.completions, np.log(expected), ONE, most=18)
    assert_mean(np.exp(np.asarray(found.info.log_z)), (P * np.exp(R)).sum())


def test_inference_time_pessimism():
    """l is exact: the mean weight is 1; the law is that of n-tuples."""
    made = module("inference_time_pessimism")

    def weight(i):
        return np.asarray(made.weights(jnp.asarray(R[i], jnp.float32)[None], 0.8))[0]

    np.testing.assert_allclose(made.weights(jax.random.normal(jax.random.key(0), (7, 9)), 0.8).mean(1), 1, rtol=1e-5)
    expected = of_tuples(P, weight, 3)
    params = {"policy": jnp.log(P)[None], "reward": jnp.asarray(R)}
    found = drawn(lambda *a, **k: made.method(FROM_ONE, REWARD_ONE, 0.8, params, *a, num_samples=3, **k), ONE)
    assert_law(found.completions, np.log(expected), ONE, most=18)


def test_power_by_quest(tables):
    b = tables[0]
    params = {"policy": b, "reward": b, "beta": 1 / 3}
    found = drawn(lambda *a, **k: module("power_by_quest").method(BASE, params, *a, 32, **k), TREE)
    power = 4 * law(b) - np.log(np.exp(4 * law(b)).sum())
    count = np.bincount(index_of(TREE, found.completions), minlength=len(power)) / 4000
    assert 0.5 * np.abs(count - np.exp(power)).sum() <= 0.06
    cold = exact.log_law(TREE, policies.temperature(BASE), {"policy": b, "temperature": 0.25})
    np.testing.assert_allclose(exact.total_variation(cold, power), 0.277, atol=5e-4)


def test_power_by_smc(tables):
    b = tables[0]
    params = {"policy": policies.TemperatureParams(b, 0.25), "reward": b, "beta": 1 / 3}
    found = drawn(lambda *a, **k: module("power_by_smc").method(BASE, params, *a, 4, **k), TREE)
    assert_mean(np.exp(np.asarray(found.info.log_z)), np.exp(4 * law(b)).sum())


def test_twisted_smc(tables):
    """Any critic has E Z^ = Z; the exact soft value makes every weight Z."""
    b, _, q = tables
    reward = jnp.asarray(exact_last(q))
    z = (np.exp(law(b)) * np.exp(np.asarray(reward) / 0.7)).sum()
    soft = tree.q_values(TREE, tree.soft_value(TREE, b, reward=reward, beta=0.7), reward=reward)
    build, paid = module("twisted_smc").method, tree.reward(TREE)
    for critic, size in ((q, 4000), (soft, 20)):
        params = {"policy": policies.TiltParams(b, critic, 0.7), "reward": reward, "beta": 0.7}
        found = drawn(lambda *a, params=params, **k: build(BASE, LEVEL, paid, params, *a, 4, **k), TREE, size)
        if size == 20:
            np.testing.assert_allclose(np.exp(found.info.log_z), z, rtol=1e-4)
        else:
            assert_mean(np.exp(np.asarray(found.info.log_z)), z)


def test_infalign_tilt(tables):
    """E Z^ = Σ b exp(C/beta), C the place of the reward among a table of base rewards."""
    b, _, q = tables
    reward = exact_last(q)
    table = np.sort(reward[[0, 2, 3, 5, 7, 9]]).astype(np.float32)
    c = np.array([((table < r).sum() + (table <= r).sum()) / 2 / len(table) for r in reward.astype(np.float32)])
    own = {"reward": jnp.asarray(reward, jnp.float32), "map": {"table": jnp.tile(table, (4000, 1))}}
    params = {"policy": b, "reward": own, "beta": 0.5}
    found = drawn(lambda *a, **k: module("infalign_tilt").method(BASE, tree.reward(TREE), params, *a, 4, **k), TREE)
    assert_mean(np.exp(np.asarray(found.info.log_z)), (np.exp(law(b)) * np.exp(c / 0.5)).sum())


def test_cards_without_a_threshold_is_the_base(tables):
    """Every segment passes; nothing more is known of its law, and tests/test_cards.py has its acceptance."""
    b = tables[0]
    own = {"reward_threshold": -1e3, "entropy_threshold": 0.9, "beta": 1.0}
    params = {"policy": b, "reward": jnp.zeros(TREE.num_responses), **own}
    found = drawn(lambda *a, **k: module("cards").method(BASE, zero_reward, params, *a, **k), TREE)
    assert_law(found.completions, law(b))


def zero_reward(params, tokens, mask, prompt_length, index):
    return jnp.zeros(tokens.shape[0])


def test_weak_to_strong_search(tables):
    b, e, a = tables[0], tables[1], normalised(tables[2])
    ratio = e - a
    states = jnp.zeros(13)
    for s, z in itertools.product(range(4), range(3)):
        states = states.at[3 * s + 1 + z].set(states[s] + ratio[s, z])
    reward = tree.response_log_prob(TREE, e) - tree.response_log_prob(TREE, a)
    expected = tree.blockwise_law(TREE, b, state_score=states, reward=reward, num_samples=2, block_size=2)
    params = {"policy": b, "critic": {"critics": [e, a], "weights": jnp.array([1.0, -1.0])}}
    build = module("weak_to_strong_search").method
    found = drawn(lambda *args, **k: build(BASE, BASE, BASE, params, *args, num_samples=2, block_size=2, **k), TREE)
    assert_law(found.completions, expected)


def test_ensemble_lower_bound(tables):
    b, _, q = tables
    one, two = (jnp.asarray(exact_last(x)) for x in (q, q[:, ::-1]))
    score = (one + two) / 2 - 1.5 * jnp.abs(one - two) / 2
    expected = tree.best_of_n_law(jnp.asarray(law(b)), score=score, n=3)
    params = {"policy": b, "reward": {"rewards": [one, two]}}
    build, each = module("ensemble_lower_bound").method, [tree.reward(TREE)] * 2
    found = drawn(lambda *a, **k: build(BASE, each, 1.5, params, *a, num_samples=3, **k), TREE)
    assert_law(found.completions, expected)


def test_conformal_threshold_and_its_coverage(tables):
    """V along a response is what the tilt adds up to; over 200 splits of 99 and 100 the share cut is at most a."""
    made, (b, _, q) = module("conformal_threshold"), tables
    assert made.method(jnp.arange(99.0), 0.1) == 9
    assert made.method(jnp.arange(5.0), 0.1) == -jnp.inf
    completions = exact.completions(TREE, BASE, b)
    params = policies.TiltParams(b, q, 1.0)
    prompts = exact.one_prompt(len(completions.tokens))
    least = made.least_value(BASE, LEVEL, params, exact.RNG, prompts, completions.tokens, completions.mask)
    tokens, mask = TREE.responses
    np.testing.assert_allclose(least, np.where(mask, np.asarray(q)[TREE.nodes, tokens], np.inf).min(1), atol=1e-5)
    draw, p = np.random.default_rng(0), np.exp(law(b))
    cut = []
    for _ in range(200):
        runs = np.asarray(least)[draw.choice(len(p), size=199, p=p / p.sum())] + 1e-4 * draw.normal(size=199)
        cut.append((runs[99:] < float(made.method(jnp.asarray(runs[:99]), 0.1))).mean())
    # Without ties the share is k/(n + 1) = .1.
    assert_mean(np.array(cut), 0.1, errors=4)


# Searches on tree D: two tokens each of two, scores (.3, -.2) of the first and rewards of 00, 01, 10, 11 --------------

D = tree.Tree(2, 2, eos_id=None)
FIRST, LAST = np.array([0.3, -0.2]), np.array([0.0, 1.0, 2.0, -1.0])
D_BASE = jnp.log(jnp.array([[0.6, 0.4], [0.5, 0.5], [0.2, 0.8]]))
D_LEVEL = jnp.asarray(np.concatenate([FIRST[None], LAST.reshape(2, 2)]), jnp.float32)


def partial_reward(params, tokens, mask, prompt_length, index):
    """The rewards of whole responses, and the scores of those that have one token."""
    text, real = mdp.compact(tokens, mdp.response_part(mask, prompt_length))
    one = jnp.asarray(FIRST, jnp.float32)[text[:, 0]]
    return jnp.where(real.sum(axis=1) == 1, one, jnp.asarray(LAST, jnp.float32)[2 * text[:, 0] + text[:, 1]])


def blocks_of_d(samples):
    scores = jnp.concatenate([jnp.zeros(1), jnp.asarray(FIRST, jnp.float32)])
    reward = jnp.asarray(LAST, jnp.float32)
    return tree.blockwise_law(D, D_BASE, state_score=scores, reward=reward, num_samples=samples, block_size=1)


def test_speculative_rejection():
    """One of two goes on after the first token: as blockwise with two draws there, then the base."""
    first = np.exp(np.asarray(blocks_of_d(2))).reshape(2, 2).sum(axis=1)
    expected = (first[:, None] * np.exp(np.asarray(D_BASE))[1:]).reshape(-1)
    np.testing.assert_allclose(expected, [0.42, 0.42, 0.032, 0.128], atol=1e-6)
    build, params = module("speculative_rejection").method, {"policy": D_BASE, "reward": None}
    base = tree.policy(D)
    found = drawn(lambda *a, **k: build(base, partial_reward, params, *a, 2, ((1, 1),), **k), D)
    assert_law(found.completions, np.log(expected), D, most=22)
    none = drawn(lambda *a, **k: build(base, partial_reward, params, *a, 2, (), **k), D)
    plain = tree.best_of_n_law(tree.response_log_prob(D, D_BASE), score=jnp.asarray(LAST), n=2)
    assert_law(none.completions, plain, D, most=22)


def test_beam_search():
    expected = exact.beam_law(D, D_BASE, D_LEVEL, width=2, samples=2)
    np.testing.assert_allclose(np.exp(expected), [0.075876, 0.843228, 0.07041, 0.010486], atol=1e-6)
    one = exact.beam_law(D, D_BASE, D_LEVEL, width=1, samples=3)
    np.testing.assert_allclose(np.exp(one), np.exp(np.asarray(blocks_of_d(3))), atol=1e-6)
    build, params = module("beam_search").method, {"policy": D_BASE, "critic": D_LEVEL}
    parts, size = (tree.policy(D), tree.critic(D, "level")), {"width": 2, "num_samples": 2, "block_size": 1}
    found = drawn(lambda *a, **k: build(*parts, params, *a, **size, **k), D)
    assert_law(found.completions, expected, D, most=22)


@pytest.mark.parametrize(
    ("groups", "literal"),
    [(2, [0.087108, 0.790524, 0.111882, 0.010486]), (4, [0.009415, 0.779229, 0.211247, 0.00011])],
)
def test_diverse_tree_search(groups, literal):
    """Independent searches: the best of so many draws of the law of blockwise decoding."""
    expected = tree.best_of_n_law(blocks_of_d(2), score=jnp.asarray(LAST), n=groups)
    np.testing.assert_allclose(np.exp(expected), literal, atol=1e-6)
    params = {"policy": D_BASE, "critic": D_LEVEL, "reward": jnp.asarray(LAST, jnp.float32)}
    parts = tree.policy(D), tree.critic(D, "level"), tree.reward(D)
    build, size = module("diverse_tree_search").method, {"num_samples": 2, "block_size": 1}
    found = drawn(lambda *a, **k: build(*parts, params, *a, groups, **size, **k), D)
    assert_law(found.completions, expected, D, most=22)

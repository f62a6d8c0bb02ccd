"""Pools of critics and rewards: their numbers, the worst weights of robust decoding, derivatives and laws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, pools, rewards, testing, tree
from jaxalign._arrays import NEGATIVE, is_supported
from tests import cases, exact
from tests.conftest import PROMPTS, VOCAB, padded

TREE = tree.Tree(4, 3)
BASE, LEVEL = tree.policy(TREE), tree.critic(TREE, "level")
MEMBERS = jnp.array([[1.0, 0.0, 2.0], [1.0, 2.0, -1.0], [1.0, 1.0, 1.0]]).T  # columns (1,1,1), (0,2,1), (2,-1,1)


def test_pools_of_three_members():
    over = MEMBERS.reshape(3, 3, 1)  # [B,m,K]
    for f, expected in (
        (pools.minimum, [1, 0, -1]),
        (pools.lower_bound(1.0), [1, 0.183503, -0.580552]),
        (pools.lower_bound(0.0), [1, 1, 2 / 3]),
        (pools.soft_minimum(0.5), [1, 0.47784, -0.460984]),
    ):
        np.testing.assert_allclose(f(None, MEMBERS, None), expected, atol=1e-6)
        np.testing.assert_allclose(f(None, over, None, None)[:, 0], expected, atol=1e-6)
        assert np.isfinite(jax.grad(lambda x, f=f: f(None, x, None).sum())(MEMBERS)).all()


VALUES = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
LOG_BASE = jnp.log(jnp.array([0.5, 0.3, 0.2]))


@pytest.mark.parametrize("f", [pools.minimum, pools.lower_bound(0.0), pools.lower_bound(1.0), pools.soft_minimum(0.5)])
def test_a_token_outside_a_members_support_is_outside_the_pools(f):
    scores = jnp.array([[[0.0, 1.0], [2.0, NEGATIVE], [1.0, 3.0]]])
    found = f(None, scores, None)[0]
    np.testing.assert_array_equal(is_supported(found), [True, False])
    assert np.isfinite(found).all()
    assert np.isfinite(jax.grad(lambda x: f(None, x, None)[0, 0])(scores)).all()


@pytest.mark.parametrize(
    ("beta", "weight", "mean", "dual"), [(1.0, 0.35261, 0.45573, 0.445325), (0.25, 0.44928, 0.47625, 1.845796)]
)
def test_the_worst_weights_make_the_objectives_equal(beta, weight, mean, dual):
    q = pools.worst_case()({"beta": beta}, VALUES[None], LOG_BASE[None], jnp.zeros(1, jnp.int32))[0]
    np.testing.assert_allclose(q, [weight, 1 - weight, (1 - weight) / 2], atol=6e-6)
    tilted = jax.nn.softmax(LOG_BASE + q / beta)
    np.testing.assert_allclose(VALUES @ tilted, mean, atol=6e-6)
    np.testing.assert_allclose(jax.nn.logsumexp(LOG_BASE + q / beta), dual, atol=2e-6)
    kl = (tilted * (jnp.log(tilted) - LOG_BASE)).sum()
    np.testing.assert_allclose(mean / beta - kl, dual, atol=3e-5)


def test_the_worst_weights_keep_the_optimality_conditions_on_faces():
    """E V_g >= Σ w E V_g for all g, equal where w_g > 0; among the draws some weights are 0 and members repeat."""
    draw = np.random.default_rng(0)
    worst = jax.jit(jax.vmap(pools.worst_weights))
    theta = draw.normal(size=(60, 4, 7)) * draw.choice([0.1, 1.0, 10.0], size=(60, 1, 1))
    theta[::5, 3] = theta[::5, 0]
    theta, log_base = jnp.asarray(theta, float), jax.nn.log_softmax(jnp.asarray(draw.normal(size=(60, 7)), float))
    weights = worst(theta, log_base)
    tilted = jax.nn.softmax(log_base + jnp.einsum("nm,nmk->nk", weights, theta))
    mean = np.asarray(jnp.einsum("nmk,nk->nm", theta, tilted))
    level = (np.asarray(weights) * mean).sum(1, keepdims=True)
    slack = (mean - level) / np.abs(theta).max((1, 2))[:, None]
    assert slack.min() > -1e-4
    assert np.abs(slack[np.asarray(weights) > 1e-4]).max() < 1e-4
    assert 20 < (weights == 0).any(1).sum() < 60
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def test_derivatives_of_the_worst_weights_are_those_of_differences():
    """Inside the simplex, and on a face: a third objective that is never the worst."""
    way = jax.random.normal(jax.random.key(0), (3, 3))
    for theta in (4 * VALUES, jnp.concatenate([VALUES, VALUES.sum(0, keepdims=True) + 1])):
        step = 1e-2 * way[: len(theta)]
        slope = jax.jit(lambda x, dx: jax.jvp(lambda y: pools.worst_weights(y, LOG_BASE), (x,), (dx,))[1])(theta, step)
        worst = jax.jit(pools.worst_weights)
        difference = (worst(theta + step, LOG_BASE) - worst(theta - step, LOG_BASE)) / 2
        np.testing.assert_allclose(slope, difference, atol=1e-3 * float(jnp.abs(slope).max()) + 1e-6)


@pytest.mark.parametrize("name", ["worst_case", "lower_bound"])
def test_the_laws_of_a_pool_of_critics(name):
    base, one, two = jax.random.normal(jax.random.key(7), (3, TREE.num_states, 4))
    f, own = (
        (pools.worst_case(), {"beta": jnp.linspace(0.5, 1.5, 5)})
        if name == "worst_case"
        else (pools.lower_bound(0.5), None)
    )
    # A pool of a pool, and of an increment as a level.
    inner = critics.pool([LEVEL, LEVEL], pools.minimum)
    critic = critics.pool([inner, critics.level_of(tree.critic(TREE, "increment"))], f)
    params = critics.PoolParams([critics.PoolParams([one, two]), 0.5 * base], own)
    testing.check_critic(
        critic, params, padded(PROMPTS), policy=BASE, policy_params=base, max_new_tokens=3, per_prompt=()
    )


def test_a_pool_of_one_is_the_part_and_a_token_that_one_forbids_is_forbidden():
    base, q = jax.random.normal(jax.random.key(7), (2, TREE.num_states, 4))
    for f, own in ((pools.minimum, None), (pools.lower_bound(2.0), None), (pools.worst_case(), {"beta": 0.7})):
        alone = exact.tilted_law(TREE, base, critics.pool([LEVEL], f), {"critics": [q], "pool": own}, beta=0.7)
        np.testing.assert_allclose(alone, exact.tilted_law(TREE, base, LEVEL, q, beta=0.7), atol=2e-6)
    scores = jnp.stack([q[:2], q[:2].at[:, 1].set(NEGATIVE)], axis=1)
    found = pools.worst_case()({"beta": 1.0}, scores, jax.nn.log_softmax(base[:2]), jnp.zeros(2, jnp.int32))
    assert (found[:, 1] == NEGATIVE).all()
    assert (jnp.abs(found[:, [0, 2, 3]]) < 10).all()


def test_rewards_from_policies_and_their_pool():
    """log pi(y) of steps, of a parallel form, and DPO's implicit reward; an ensemble's lower bound."""
    lm, params = cases.tiny_lm(0)
    other = jax.tree.map(lambda x: x * 0.9, params)
    policy, prompts = policies.language_model(lm), padded(PROMPTS)
    tokens = jnp.arange(15).reshape(5, 3) * 7 % VOCAB
    mask = jnp.ones((5, 3), bool).at[1, 2].set(False)
    whole = (
        *decoding.join(prompts, decoding.log_prob(policy, params, exact.RNG, prompts, tokens, mask)),
        jnp.arange(5),
    )
    expected = [decoding.log_prob(policy, p, exact.RNG, prompts, tokens, mask).log_prob.sum(1) for p in (params, other)]
    stepped = policies.temperature(policy)
    for reward, given in (
        (rewards.from_policy(policy), params),
        (rewards.from_policy(stepped), {"policy": params, "temperature": 1.0}),
    ):
        np.testing.assert_allclose(jax.jit(reward)(given, *whole), expected[0], rtol=1e-5, atol=1e-5)
    implicit = rewards.weighted_sum([rewards.from_policy(policy)] * 2)
    found = implicit({"rewards": [params, other], "weights": jnp.array([0.3, -0.3])}, *whole)
    np.testing.assert_allclose(found, 0.3 * (expected[0] - expected[1]), rtol=1e-4, atol=1e-5)
    worst = rewards.pool([rewards.from_policy(policy)] * 2, pools.lower_bound(1.0))
    mean, half = (expected[0] + expected[1]) / 2, jnp.abs(expected[0] - expected[1]) / 2
    np.testing.assert_allclose(worst({"rewards": [params, other]}, *whole), mean - half, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [-0.5, 0.3], [0.5, 0.0]])
def test_a_response_outside_a_policy_has_log_zero_in_sums_of_rewards(weights):
    """Also where both policies cannot write it, whose difference would be 0, and where the weight is below 0."""
    table = jax.nn.log_softmax(jax.random.normal(jax.random.key(7), (TREE.num_states, 4)))
    cut = policies.top_k(BASE, 2)
    prompts, completions = exact.one_prompt(TREE.num_responses), exact.completions(TREE, cut, table)
    whole = (*decoding.join(prompts, completions), prompts.index)
    inside = np.asarray(is_supported(completions.log_prob).all(axis=1))
    assert 0 < inside.sum() < len(inside)
    both = rewards.weighted_sum([rewards.from_policy(cut), rewards.from_policy(cut)])
    found = both({"rewards": [table, table], "weights": jnp.array(weights)}, *whole)
    np.testing.assert_array_equal(is_supported(found), inside)
    expected = sum(weights) * np.asarray(completions.log_prob.sum(axis=1))
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)


def test_a_reward_from_a_policy_keeps_the_laws_and_has_gradients():
    table = jax.random.normal(jax.random.key(7), (TREE.num_states, 4))
    reward = rewards.pool(
        [rewards.from_policy(BASE), rewards.from_policy(policies.top_k(BASE, 4))], pools.soft_minimum(0.5)
    )
    params = {"rewards": [table, -table]}
    testing.check_reward(reward, params, padded(PROMPTS), vocab_size=4, max_new_tokens=3)
    prompts = exact.one_prompt(TREE.num_responses)
    completions = exact.completions(TREE, BASE, table)
    whole = (*decoding.join(prompts, completions), prompts.index)
    np.testing.assert_allclose(
        rewards.from_policy(BASE)(table, *whole), tree.response_log_prob(TREE, jax.nn.log_softmax(table)), atol=2e-6
    )
    gradient = jax.grad(lambda given: rewards.from_policy(BASE)(given, *whole)[3])(table)
    np.testing.assert_allclose(
        gradient, jax.grad(lambda x: tree.response_log_prob(TREE, jax.nn.log_softmax(x))[3])(table), atol=1e-6
    )


def test_what_is_refused():
    table = jnp.zeros((TREE.num_states, 4))
    increment = tree.critic(TREE, "increment")
    for build, match in (
        (lambda: critics.pool([LEVEL, increment], pools.minimum), r"critics\[1\]: expected a level critic.*level_of"),
        (lambda: critics.pool([], pools.minimum), "critics: expected at least one critic, found none"),
        (lambda: critics.pool(LEVEL, pools.minimum), "critics: expected a sequence of critics, found one Critic"),
        (lambda: critics.pool([LEVEL, tree.critic(tree.Tree(5, 3), "level")], pools.minimum), "one vocabulary"),
        (lambda: critics.pool([LEVEL], 3), "f: expected a function, found 3"),
        (lambda: rewards.pool([], pools.minimum), "rewards: expected at least one reward, found none"),
        (lambda: rewards.from_policy(LEVEL), "policy: expected a Policy, found a Critic"),
        (lambda: pools.lower_bound(-1.0), "k: expected a number >= 0, found -1.0"),
        (lambda: pools.soft_minimum(0.0), "tau: expected a value > 0, found 0"),
    ):
        with pytest.raises(ValueError, match=match):
            build()
    tilted = policies.tilt(BASE, critics.pool([LEVEL, LEVEL], flat))
    params = {"policy": table, "critic": {"critics": [table, table]}, "beta": 1.0}
    with pytest.raises(ValueError, match=r"pool: f \(flat\): expected shape \(2, 4\), one score per row"):
        tilted.init(params, exact.RNG, tree.prompts(2), 3)
    short = {"policy": table, "critic": {"critics": [table]}, "beta": 1.0}
    with pytest.raises(ValueError, match=r"params\['critic'\]\['critics'\]: expected parameters of 2 critics, found 1"):
        tilted.check(short, tree.prompts(2), 3)


def flat(pool_params, scores, log_prob, index):
    return scores.sum()


def test_one_beta_for_the_pool_and_its_tilt():
    """Given to both, per prompt, it gives each prompt the law of its own beta, and one derivative."""
    base, q = exact.tables(TREE, 3)[0], exact.tables(TREE, 4)[0]
    policy = policies.tilt(BASE, critics.pool([LEVEL, LEVEL], pools.worst_case()))
    tokens, mask = exact.responses(TREE)
    weight = jnp.cos(jnp.arange(mask.shape[1]))

    def score(beta):
        params = policies.TiltParams(base, critics.PoolParams([q, q[:, ::-1]], {"beta": beta}), beta)
        prompts = tree.prompts(3)
        found = decoding.log_prob(policy, params, exact.RNG, prompts, tokens[:3], mask[:3]).log_prob
        return jnp.where(mask[:3], found * weight, 0).sum(axis=1)

    beta = jnp.array([0.4, 0.9, 2.0])
    each = [float(score(jnp.full(3, b))[i]) for i, b in enumerate(beta)]
    np.testing.assert_allclose(score(beta), each, atol=1e-5)
    slope = jax.grad(lambda b: score(b).sum())(beta)
    moved = (score(beta + 2e-3) - score(beta - 2e-3)) / 4e-3
    np.testing.assert_allclose(slope, moved, rtol=2e-2, atol=2e-3)

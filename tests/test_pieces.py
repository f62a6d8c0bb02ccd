"""Policies from policies on a tree: mixtures, products, truncations and a KL per step, beside their exact laws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, testing, tree
from jaxalign._arrays import is_supported
from tests import exact
from tests.conftest import PROMPTS, padded
from tests.sampling import assert_mean

TREE = tree.Tree(4, 3)
BASE, LEVEL, INCREMENT = tree.policy(TREE), tree.critic(TREE, "level"), tree.critic(TREE, "increment")
TILT = policies.tilt(BASE, LEVEL)


@pytest.fixture(scope="module")
def tables():
    """(log pi, log pi', q), each [S,V]."""
    base, other, q = jax.random.normal(jax.random.key(7), (3, TREE.num_states, 4), dtype=float)
    return jax.nn.log_softmax(base), jax.nn.log_softmax(other), q


def law(table):
    return np.asarray(tree.response_log_prob(TREE, table))


def first(policy, params):
    """The StepOutput of one prompt's first token."""
    output = policy.init(params, jax.random.key(0), tree.prompts(1), 3)[1]
    return jax.tree.map(lambda x: np.asarray(x)[0], output)


def test_a_mixture_is_of_the_laws_of_whole_responses(tables):
    base, other, q = tables
    mixed = policies.mix([BASE, TILT, BASE], reference=1)
    weights = np.array([0.2, 0.5, 0.3])
    params = {"policies": [base, policies.TiltParams(base, q, 0.7), other], "weights": 3 * jnp.asarray(weights)}
    parts = [law(base), exact.tilted_law(TREE, base, LEVEL, q, beta=0.7), law(other)]
    expected = np.log(weights @ np.exp(parts))
    found = exact.log_law(TREE, mixed, params)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    # With fixed weights it would be another law.
    tables_of = jnp.stack([base, jax.nn.log_softmax(base + q / 0.7), other])
    fixed = law(jax.nn.logsumexp(tables_of + jnp.log(weights)[:, None, None], axis=0))
    assert exact.total_variation(fixed, expected) > 0.01
    np.testing.assert_allclose(
        exact.log_law(TREE, policies.mix([BASE]), {"policies": [base], "weights": [2.0]}), law(base), atol=1e-6
    )
    scored = exact.completions(TREE, mixed, params)
    np.testing.assert_allclose(scored.log_prob_ref.sum(1), law(base), atol=2e-6)
    own = exact.completions(TREE, policies.mix([BASE, TILT, BASE]), params)
    np.testing.assert_allclose(own.log_prob_ref, own.log_prob)


def test_a_mixture_of_disjoint_supports_writes_with_one_of_them(tables):
    base, other, _ = tables
    one = policies.top_k(BASE, 1)
    mixed = policies.mix([one, one])
    found = exact.log_law(TREE, mixed, {"policies": [base, other], "weights": jnp.array([0.25, 0.75])})
    both = [tree.greedy_response(TREE, table) for table in (base, other)]
    assert both[0] != both[1]
    np.testing.assert_allclose(np.exp(found)[jnp.array(both)], [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-6)


def test_a_product_is_the_weighted_sum_of_its_steps(tables):
    base, other, q = tables
    both = policies.product([BASE, TILT])
    params = {"policies": [base, policies.TiltParams(other, q, 0.7)], "weights": jnp.array([1.6, -0.6])}
    second = jax.nn.log_softmax(other + q / 0.7)
    found = exact.completions(TREE, both, params)
    np.testing.assert_allclose(found.log_prob.sum(1), law(jax.nn.log_softmax(1.6 * base - 0.6 * second)), atol=5e-6)
    np.testing.assert_allclose(found.log_prob_ref.sum(1), law(base), atol=2e-6)
    alone = exact.completions(TREE, policies.product([TILT]), {"policies": [params["policies"][1]], "weights": [1.0]})
    part = exact.completions(TREE, TILT, params["policies"][1])
    for name in ("log_prob", "log_prob_ref", "log_norm"):
        np.testing.assert_allclose(getattr(alone, name), getattr(part, name), atol=2e-6)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.5, -0.5], [1.0, 0.0]])
def test_a_product_keeps_to_the_supports_of_parts_with_weight(tables, weights):
    base, other, _ = tables
    both = policies.product([BASE, policies.top_k(BASE, 2)])
    output = first(both, {"policies": [base, other], "weights": jnp.array(weights)})
    kept = np.sort(jax.lax.top_k(other[0], 2)[1]) if weights[1] else np.arange(4)
    np.testing.assert_array_equal(np.flatnonzero(is_supported(output.log_prob)), kept)
    np.testing.assert_allclose(np.exp(output.log_prob).sum(), 1, rtol=1e-6)
    none = policies.product([policies.top_k(BASE, 1), policies.top_k(BASE, 1)])
    output = first(none, {"policies": [base, -base], "weights": jnp.array([1.0, 1.0])})
    assert output.log_prob.argmax() == base[0].argmax()
    assert not is_supported(output.log_norm)


def test_the_sets_that_truncations_keep():
    """By hand: entropy 1.2799; the distances of its tokens' surprisals to it are .364, .076, .330, 1.716."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    table = jnp.broadcast_to(jnp.log(p), (TREE.num_states, 4))

    def kept(policy, name, value):
        output = first(policy(BASE), {"policy": table, name: value})
        return np.flatnonzero(is_supported(output.log_prob)).tolist()

    assert [kept(policies.min_p, "min_p", a) for a in (0.2, 0.45, 0.7, 0.76, 1.0)] == [
        [0, 1, 2, 3],
        [0, 1, 2],
        [0, 1],
        [0],
        [0],
    ]
    assert [kept(policies.typical, "typical", t) for t in (1e-6, 0.29, 0.31, 0.51, 0.95, 1.0)] == [
        [1],
        [1],
        [1, 2],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]
    uniform = jnp.zeros_like(table)
    kept_ties = first(policies.typical(BASE), {"policy": uniform, "typical": 0.5})
    np.testing.assert_array_equal(is_supported(kept_ties.log_prob), [True, True, False, False])
    np.testing.assert_allclose(kept_ties.log_norm, np.log(0.5), atol=1e-6)
    for policy, name in ((policies.min_p, "min_p"), (policies.typical, "typical")):  # what is no number is seen
        assert np.isnan(first(policy(BASE), {"policy": table * jnp.nan, name: 0.5}).log_norm)


def test_a_kl_budget_is_spent_at_each_step(tables):
    base, _, q = tables
    for critic in (LEVEL, INCREMENT):
        policy = policies.kl_budget(BASE, critic)
        scored = exact.completions(TREE, policy, {"policy": base, "critic": q, "kl": 0.1})
        real = np.asarray(scored.mask)
        np.testing.assert_allclose(np.asarray(scored.kl)[real], 0.1, atol=2e-5)
        p = np.exp(np.asarray(scored.log_prob).sum(1))
        length = (p * real.sum(1)).sum()
        np.testing.assert_allclose((p * np.asarray(scored.kl).sum(1)).sum(), 0.1 * length, rtol=1e-4)
    params = {"policy": base, "critic": q, "kl": 0.1}
    level, turned = (
        exact.completions(TREE, policies.kl_budget(BASE, critic), params)
        for critic in (LEVEL, critics.increment_of(LEVEL))
    )
    np.testing.assert_allclose(level.log_norm, turned.log_norm, atol=1e-4)
    greedy = first(policies.kl_budget(BASE, LEVEL), {"policy": base, "critic": q, "kl": 50.0})
    assert np.exp(greedy.log_prob[q[0].argmax()]) > 0.999
    flat = first(policies.kl_budget(BASE, LEVEL), {"policy": base, "critic": 0 * q, "kl": 0.1})
    np.testing.assert_allclose(flat.log_prob, base[0], atol=1e-6)


def test_a_kl_budget_as_a_proposal_leaves_the_partition_function_unbiased(tables):
    """Resampled at each step by weights that are no soft value's: E[exp(log_z)] = Z, and the weights differ."""
    base, _, q = tables
    tokens, mask = TREE.responses
    last = mask.sum(1) - 1
    rows = np.arange(len(tokens))
    reward = jnp.asarray(np.asarray(q)[TREE.nodes[rows, last], tokens[rows, last]])
    z = (np.exp(np.asarray(tree.response_log_prob(TREE, base))) * np.exp(np.asarray(reward) / 0.7)).sum()
    soft = tree.q_values(TREE, tree.soft_value(TREE, base, reward=reward, beta=0.7), reward=reward)
    params = {"policy": {"policy": base, "critic": soft, "kl": 0.1}, "reward": reward, "beta": 0.7}
    arguments = {"num_particles": 4, "max_new_tokens": 3, "when": decoding.resampling.always}
    found = decoding.smc(
        policies.kl_budget(BASE, LEVEL), tree.reward(TREE), params, exact.RNG, tree.prompts(4000), **arguments
    )
    assert_mean(np.exp(np.asarray(found.info.log_z)), z)
    assert np.asarray(found.info.log_weight).std() > 0.05


def pieces(tables):
    """name -> (policy, params): each builder once, nested twice."""
    base, other, q = tables
    tilted = policies.TiltParams(other, q, jnp.asarray(0.7))
    cut = {"policy": base, "min_p": jnp.asarray(0.3)}
    product = {"policies": [tilted, cut], "weights": jnp.array([0.8, 0.5])}
    return {
        "mix": (
            policies.mix([policies.product([TILT, policies.min_p(BASE)]), TILT], reference=0),
            {"policies": [product, tilted], "weights": jnp.array([0.3, 0.7])},
        ),
        "kl_budget": (
            policies.kl_budget(policies.typical(TILT), critics.from_policy(BASE), top_k=3),
            {"policy": {"policy": tilted, "typical": jnp.asarray(0.7)}, "critic": base, "kl": jnp.asarray(0.05)},
        ),
    }


@pytest.mark.parametrize("name", ["mix", "kl_budget"])
def test_the_laws(tables, name):
    policy, params = pieces(tables)[name]
    names = ("weights", "min_p", "typical", "kl", "beta")
    testing.check_policy(policy, params, padded(PROMPTS), max_new_tokens=3, per_prompt=names)


def test_gradients_of_every_leaf_are_those_of_differences(tables):
    """log pi of all responses, weighted, along one direction of all leaves at once."""
    weight = jax.random.normal(jax.random.key(1), (TREE.num_responses,))
    for name, (policy, params) in pieces(tables).items():

        @jax.jit
        def total(given, policy=policy):
            scored = exact.completions(TREE, policy, given)
            return (jnp.where(scored.in_support[:, None], scored.log_prob, 0).sum(1) * weight).sum()

        leaves, form = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        way = jax.tree.unflatten(
            form, [0.3 * jax.random.normal(k, x.shape) * jnp.abs(x) for k, x in zip(keys, leaves, strict=True)]
        )
        gradient = jax.grad(total)(params)
        reached = {
            jax.tree_util.keystr(path): bool(leaf.any()) for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        }
        assert {path for path, found in reached.items() if not found} <= {
            "['policies'][0]['policies'][1]['min_p']",
            "['policy']['typical']",
        }
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, way)))
        moved = [total(jax.tree.map(lambda x, d, s=s: x + s * d, params, way)) for s in (5e-3, -5e-3)]
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 1e-2, rtol=5e-3, atol=5e-3, err_msg=name)


def test_what_is_refused(tables):
    base, _, q = tables
    other = tree.policy(tree.Tree(5, 3))
    for build, match in (
        (lambda: policies.mix(BASE), "mix: policies: expected a sequence of policies, found one Policy"),
        (lambda: policies.product([]), "policies: expected at least one policy, found none"),
        (lambda: policies.product([BASE, LEVEL]), r"policies\[1\]: expected a Policy, found a Critic"),
        (lambda: policies.mix([BASE, other]), r"policies: expected one vocabulary, found \[4, 5\] tokens"),
        (lambda: policies.mix([BASE], reference=1), "reference: expected one of the policies, 0 to 0, found 1"),
        (lambda: policies.kl_budget(LEVEL, BASE), "policy: expected a Policy, found a Critic"),
        (
            lambda: policies.kl_budget(BASE, LEVEL._replace(beta=2.0)),
            "critic: expected scores for any beta, found some for 2 alone",
        ),
        (
            lambda: policies.kl_budget(BASE, LEVEL, top_k=5),
            "top_k: expected at most the vocabulary's 4 tokens, found 5",
        ),
        (lambda: policies.min_p(LEVEL), "policy: expected a Policy, found a Critic"),
    ):
        with pytest.raises(ValueError, match=match):
            build()
    two = policies.mix([BASE, BASE])
    for policy, params, match in (
        (two, {"policies": [base, base], "weights": [0.5, 0.0]}, "weights: expected finite numbers > 0, found"),
        (two, {"policies": [base, base], "weights": [0.5]}, r"weights: expected shape \(2,\) or \(2, 2\)"),
        (
            two,
            {"policies": [base], "weights": [0.5, 0.5]},
            r"params\['policies'\]: expected parameters of 2 policies, found 1",
        ),
        (two, {"policies": [base, q[:2]], "weights": [0.5, 0.5]}, "params: expected a table of shape"),
        (policies.min_p(BASE), {"policy": base, "min_p": 0.0}, r"min_p: expected a value in \(0, 1\], found 0.0"),
        (policies.typical(BASE), {"policy": base, "typical": 1.5}, r"typical: expected a value in \(0, 1\], found 1.5"),
        (policies.kl_budget(BASE, LEVEL), {"policy": base, "critic": q, "kl": 0.0}, "kl: expected a value > 0"),
    ):
        with pytest.raises(ValueError, match=match):
            policy.check(params, tree.prompts(2), 3)

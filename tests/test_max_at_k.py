"""Advantages of groups of k draws: exact by enumeration of all groups, in float64."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import advantages, decoding, infalign, tree
from jaxalign.training import policy_gradient
from jaxalign.training.rl_options import RLOptions, check_rl_options
from jaxalign.types import Completions, TokenBatch

POLICY, VALUE = np.array([0.25, 0.35, 0.4]), np.array([0.0, 1.0, 3.0])
N, TWO = 4, 2
TUPLES = np.array(list(itertools.product(range(3), repeat=N)))
LAW = POLICY[TUPLES].prod(axis=1)
KINDS = {"max": (advantages.max_at_k, max), "min": (advantages.min_at_k, min), "pass": (advantages.pass_at_k, max)}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def expected(policy, value, k, choose):
    """E of the chosen of k draws."""
    groups = list(itertools.product(range(len(value)), repeat=k))
    return sum(math.prod(policy[i] for i in group) * choose(value[i] for i in group) for group in groups)


def scores(weights: np.ndarray) -> np.ndarray:
    """Σ_i A_i·∇log pi(y_i) in the logits, [tuples,3] of weights [tuples,N]."""
    one_hot = np.eye(3)[TUPLES]
    return (weights[..., None] * (one_hot - POLICY)).sum(axis=1)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_regression_R8_the_mean_over_all_groups_is_the_exact_gradient(kind, k):
    f, choose = KINDS[kind]
    value = (VALUE > 0).astype(float) if kind == "pass" else VALUE
    found = (LAW[:, None] * scores(np.asarray(f(jnp.asarray(VALUE[TUPLES]), k=k)))).sum(axis=0)
    exact = jax.grad(lambda logit: expected(jax.nn.softmax(logit), value, k, choose))(jnp.log(POLICY))
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_regression_R8_literals():
    assert expected(POLICY, VALUE, TWO, max) == pytest.approx(2.2175, abs=1e-12)
    reward = VALUE[TUPLES]
    weights = np.asarray(advantages.max_at_k(jnp.asarray(reward), k=TWO))
    assert (weights >= 0).all()
    mean = LAW @ scores(weights)
    np.testing.assert_allclose(mean, [-0.33375, -0.29225, 0.626], atol=1e-12)

    def trace(each):
        return LAW @ (each**2).sum(axis=1) - ((LAW @ each) ** 2).sum()

    plain = np.zeros_like(reward)  # the share of a sample in all groups of two, with no baseline
    for i, j in itertools.combinations(range(N), TWO):
        plain[:, [i, j]] += np.maximum(reward[:, i], reward[:, j])[:, None] / math.comb(N, TWO)
    np.testing.assert_allclose(LAW @ scores(plain), mean, atol=1e-12)
    assert trace(scores(plain)) == pytest.approx(2.303, abs=5e-4)
    assert trace(scores(weights)) == pytest.approx(0.239, abs=5e-4)
    biased = LAW @ scores(weights - weights.mean(axis=1, keepdims=True))
    assert np.abs(biased - mean).max() == pytest.approx(0.0499, abs=5e-5)


def test_regression_R8_a_policys_win_rate_under_best_of_two_is_the_max_at_two_of_its_quantiles():
    base, rank = np.array([0.5, 0.3, 0.2]), np.arange(3)
    rate = infalign.procedure_win_rate(POLICY, base=base, rank=rank, procedure=infalign.best_of(2))
    assert float(rate) == pytest.approx(0.665, abs=1e-12)
    below = np.cumsum(base)
    quantile = ((below - base) ** 2 + below**2) / 2
    np.testing.assert_allclose(quantile, [0.125, 0.445, 0.82], atol=1e-12)
    assert expected(POLICY, quantile, 2, max) == pytest.approx(0.665, abs=1e-12)


def test_regression_R8_pass_at_k_in_literal_numbers():
    reward = np.array([1.0, 0, 0, 1, 0, 0, 1, 0])
    n, right, k = 8, 3, 4
    assert 1 - math.comb(n - right, k) / math.comb(n, k) == pytest.approx(0.928571, abs=1e-6)
    found = np.asarray(advantages.pass_at_k(jnp.asarray(reward), k=k))
    np.testing.assert_allclose(found, np.where(reward > 0, 0.142857, 0), atol=1e-6)
    passed = dict.fromkeys(range(n), 0.0)
    for group in itertools.combinations(range(n), k):
        for i in group:
            passed[i] += max(reward[list(group)]) / math.comb(n, k)
    assert passed[0] == pytest.approx(0.5)
    assert passed[1] == pytest.approx(0.442857, abs=1e-6)


def test_ties_share_a_weight_and_prompts_do_not_mix():
    reward = np.array([[2.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = np.asarray(advantages.max_at_k(jnp.asarray(reward), k=2))
    assert found[0, 0] == found[0, 2] > found[0, 1] > found[0, 3] == 0
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_array_equal(found[0], advantages.max_at_k(jnp.asarray(reward[0]), k=2))


@pytest.mark.parametrize("k", [0, 5, 2.0])
def test_a_group_larger_than_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="k: expected"):
        advantages.max_at_k(jnp.zeros(4), k=k)


@pytest.mark.parametrize(
    ("change", "found"), [({"samples": 2}, "found rloo and 2"), ({"algorithm": "grpo"}, "found grpo and 8")]
)
def test_a_job_refuses_a_group_larger_than_its_samples_and_another_algorithm(change, found):
    with pytest.raises(ValueError, match=f"advantage: expected max@4 with rloo and at least 4 samples, {found}"):
        check_rl_options(RLOptions(advantage="max@4", **change), batch_size=4, accumulate=1)


def test_rloo_takes_the_advantage_of_the_group_less_the_kl_of_each():
    """The mean over all pairs of responses of a small process is the gradient of E[max] − beta·KL."""
    process, beta = tree.Tree(2, 2, eos_id=0), 0.3
    keys = jax.random.split(jax.random.key(0))
    policy = jax.random.normal(keys[0], (process.num_states, 2), jnp.float64)
    reference = jax.random.normal(keys[1], (process.num_states, 2), jnp.float64)
    tokens = process.responses[0]
    value, count = jnp.arange(len(tokens)) ** 1.5, len(tokens)

    def whole(logits):
        return tree.response_log_prob(process, jax.nn.log_softmax(logits, axis=-1))

    # One token stands for the response: log-probabilities of whole responses, in one column.
    pair = np.array(list(itertools.product(range(count), repeat=2)))
    column = jnp.ones((count, 1), bool)
    zero = jnp.zeros((count, 1))
    drawn = Completions(
        jnp.zeros((count, 1), jnp.int32), column, whole(policy)[:, None], zero, zero, zero, column[:, 0], column[:, 0]
    )
    asked = TokenBatch(jnp.zeros((len(pair), 1), jnp.int32), jnp.ones((len(pair), 1), bool))
    found = decoding.BestOfNInfo(jax.tree.map(lambda x: x[pair], drawn), value[pair])
    method = policy_gradient.Method(advantage="max@2")
    rows, _ = policy_gradient.prepare(
        method, None, lambda frozen, rows: whole(frozen)[pair.ravel()][:, None], policy, reference, asked, found,
        jnp.asarray(beta),
    )  # fmt: skip
    law = np.exp(np.asarray(whole(policy)))[pair].prod(axis=1)
    weight = np.repeat(law, 2) / 2 * np.asarray(rows["advantage"])
    gradient = jax.grad(lambda logits: (weight * whole(logits)[pair.ravel()]).sum())(policy)

    def objective(logits):
        prob = jnp.exp(whole(logits))
        best = (prob[:, None] * prob[None, :] * jnp.maximum(value[:, None], value[None, :])).sum()
        return best - beta * (prob * (whole(logits) - whole(reference))).sum()

    np.testing.assert_allclose(gradient, jax.grad(objective)(policy), atol=1e-12)

"""The leader's gradient through sampled followers: each surrogate's gradient against exact ones, by enumeration."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, gibbs, policies, shaping, tree
from tests import exact

# E: two responses; P3: three.
E_BASE, E_UTILITY, E_REWARD = np.log([0.9, 0.1]), np.array([1.0, 2.0]), np.array([0.0, 3.0])
BASE, UTILITY, REWARD, BETA = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 3.0]), np.array([0.2, 0.5, 1.0]), 0.7
TREE = tree.Tree(2, 3, eos_id=0)
BINARY = tree.Tree(2, 3, eos_id=None)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def policy_cases():
    states = (TREE.num_states, TREE.vocab_size)
    base, q = jax.nn.log_softmax(jnp.asarray(normal(1, *states))), normal(2, *states)
    level, increment = (tree.critic(TREE, kind) for kind in ("level", "increment"))
    plain = tree.policy(TREE)
    tilt = policies.tilt(plain, level)
    params = {"policy": base, "critic": q, "beta": np.array(0.7)}
    summed = {"critics": [q, normal(3, *states)], "weights": np.array([0.3, 0.9])}
    shaped = critics.shaped_over_candidates(level, beta=0.7, sharpness=2.0)
    return {
        "table": (plain, base),
        "level": (tilt, params),
        "increment": (policies.tilt(plain, increment), params),
        "one candidate": (policies.tilt(plain, level, top_k=1), params),
        "nested": (policies.tilt(tilt, increment), params | {"policy": params, "critic": normal(4, *states)}),
        "weighted sum": (policies.tilt(plain, critics.weighted_sum([level, level])), params | {"critic": summed}),
        "shaped": (policies.tilt(plain, shaped), params | {"critic": {"critic": q, "bound": np.array(1.1)}}),
        "temperature": (policies.temperature(tilt), {"policy": params, "temperature": np.array(0.6)}),
        "top_p": (policies.top_p(tilt), {"policy": params, "top_p": np.array(0.8)}),
        "with_reference": (policies.with_reference(tilt, plain), {"policy": params, "reference": base}),
    }


NAMES = ["increment", "nested", "shaped", "top_p", "with_reference", "one candidate", "weighted sum", "temperature"]


@pytest.mark.parametrize("name", NAMES)
def test_the_score_over_all_pairs_of_draws_is_the_gradient_of_the_exact_utility(name):
    policy, params = policy_cases()[name]
    params = jax.tree.map(lambda x: jnp.asarray(x, float), params)
    utility = jnp.asarray(normal(5, TREE.num_responses))
    first, second = map(np.ravel, np.meshgrid(*[np.arange(TREE.num_responses)] * 2))

    def estimate(params):
        """The estimate over all pairs, and the exact utility."""
        scored = exact.completions(TREE, policy, params)
        log_prob = scored.log_prob.sum(axis=1)
        prob = jnp.where(scored.in_support, jnp.exp(log_prob), 0)
        pairs = jnp.stack([log_prob[first], log_prob[second]], axis=1)
        values = jnp.stack([utility[first], utility[second]], axis=1)
        each = jax.vmap(lambda a, u: shaping.score_function(a, utility=u))(pairs, values)
        weight = jax.lax.stop_gradient(prob[first] * prob[second])
        return jnp.where(weight > 0, weight * each, 0).sum(), prob @ utility

    both = jax.jit(jax.grad(estimate, has_aux=True))

    def delivered(params):
        return float(both(params)[1])

    found = both(params)[0]
    leaves, structure = jax.tree.flatten(params)
    draw = np.random.default_rng(6)
    along = structure.unflatten([jnp.asarray(draw.normal(size=x.shape)) for x in leaves])
    h = 1e-5
    moved = [delivered(jax.tree.map(lambda x, d, s=s: x + s * d, params, along)) for s in (h, -h)]
    slope = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(along), strict=True))
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / (2 * h), atol=1e-7)


def token_estimates(seed: int):
    """name -> (estimates [M, S·V] of each response, law [M]); and the exact gradient."""
    q_params, utility = jnp.asarray(normal(seed, *BINARY_STATES)), jnp.asarray(normal(seed + 1, BINARY.num_responses))
    base = jax.nn.log_softmax(jnp.asarray(normal(seed + 2, *BINARY_STATES)))
    nodes, tokens, mask = (jnp.asarray(x) for x in (BINARY.nodes, *BINARY.responses))

    def table(phi):
        return tree.tilted_policy(base, phi, beta=0.7)

    def law(phi):
        return jnp.exp(tree.response_log_prob(BINARY, table(phi)))

    prob = law(q_params)
    value = tree.value(BINARY, table(q_params), utility)
    exact_q = tree.q_values(BINARY, value, reward=utility)
    wrong = exact_q + 0.3 * jnp.sin(1 + jnp.arange(exact_q.size)).reshape(exact_q.shape)

    def tokenwise(form):
        def one(phi, i):
            log_all = table(phi)[nodes[i]]
            return form(log_all, log_all[jnp.arange(3), tokens[i]], nodes[i], tokens[i], mask[i], utility[i])

        return jax.vmap(jax.grad(one), (None, 0))(q_params, jnp.arange(BINARY.num_responses))

    def all_tokens(q, corrected):
        def form(log_all, log_prob, node, token, real, u):
            given = {"q": q[node], "log_prob": log_prob, "chosen_q": q[node, token], "utility": u, "mask": real}
            return shaping.all_tokens(log_all, **given, corrected=corrected)

        return form

    def togo(log_all, log_prob, node, token, real, u):
        return shaping.togo(log_prob, q=exact_q[node, token], value=value[node], mask=real)

    mean = prob @ utility
    forms = {
        "score": lambda a, log_prob, s, z, m, u: u * log_prob.sum(),
        "mean": lambda a, log_prob, s, z, m, u: (u - mean) * log_prob.sum(),
        "togo": togo,
        "exact": all_tokens(exact_q, True),
        "uncorrected exact": all_tokens(exact_q, False),
        "corrected": all_tokens(wrong, True),
        "uncorrected": all_tokens(wrong, False),
    }
    gradient = jax.grad(lambda phi: law(phi) @ utility)(q_params).reshape(-1)
    return {name: tokenwise(form).reshape(len(prob), -1) for name, form in forms.items()}, prob, gradient


BINARY_STATES = (BINARY.num_states, BINARY.vocab_size)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_all_tokens_have_the_score_s_mean_and_less_variance_and_a_wrong_q_needs_the_correction(seed):
    estimates, prob, gradient = jax.jit(token_estimates, static_argnums=0)(seed)
    variance = {}
    for name, each in estimates.items():
        mean = prob @ each
        variance[name] = float(prob @ ((each - mean) ** 2).sum(axis=1))
        if name == "uncorrected":
            assert np.abs(mean - gradient).max() > 1e-2
        else:
            np.testing.assert_allclose(mean, gradient, atol=1e-12, err_msg=name)
    assert variance["uncorrected exact"] < variance["togo"] < variance["mean"]
    assert variance["uncorrected exact"] < variance["corrected"] < variance["mean"]
    assert variance["uncorrected exact"] < variance["mean"] / 8


def tuples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All n-tuples [3^n, n] of the three responses and their probabilities."""
    drawn = np.array(list(itertools.product(range(3), repeat=n)))
    return drawn, BASE[drawn].prod(axis=1)


@pytest.mark.parametrize(
    ("n", "value", "gradient"),
    [(2, 1.127705, (-0.259510, 0.026722, 0.232789)), (3, 1.230274, (-0.385561, -0.004813, 0.390374))],
)
def test_a_soft_pick_is_the_enumeration_of_its_draws(n, value, gradient):
    drawn, prob = tuples(n)

    def delivered(reward):
        each = jax.vmap(lambda r, u: shaping.soft_pick(r, utility=u, temperature=0.7))
        return prob @ each(reward[drawn], jnp.asarray(UTILITY)[drawn])

    found, slope = jax.jit(jax.value_and_grad(delivered))(jnp.asarray(REWARD))
    np.testing.assert_allclose(found, value, atol=1e-6)
    np.testing.assert_allclose(slope, gradient, atol=1e-6)
    hard = prob @ UTILITY[drawn[np.arange(len(drawn)), REWARD[drawn].argmax(axis=1)]]
    np.testing.assert_allclose(hard, {2: 1.47, 3: 1.851}[n], atol=1e-12)
    cold = jax.vmap(lambda r, u: shaping.soft_pick(r, utility=u, temperature=1e-3))
    np.testing.assert_allclose(prob @ cold(REWARD[drawn], UTILITY[drawn]), hard, atol=1e-9)


def test_weights_of_best_of_n_give_the_exact_gradient_in_the_drawing_policy():
    """P3, judge r, n 2, N 3: the gradient and the traces of variance with and without what a subset has without i."""
    utility = np.array([1.0, 0.0, 3.0])
    drawn, prob = tuples(3)

    def estimate(logits, i):
        log_prob = jax.nn.log_softmax(logits)[i]
        return shaping.best_of_score(log_prob, judge=jnp.asarray(REWARD)[i], utility=jnp.asarray(utility)[i], n=2)

    each = jax.vmap(jax.grad(estimate), (None, 0))(jnp.log(BASE), drawn)
    mean = prob @ each
    np.testing.assert_allclose(mean, (-0.23, -0.438, 0.668), atol=1e-12)
    np.testing.assert_allclose(prob @ ((each - mean) ** 2).sum(axis=1), 0.682, atol=1e-3)
    values = shaping.best_of_utility(REWARD[drawn], utility=utility[drawn], n=2)
    np.testing.assert_allclose(prob @ values, 1.33, atol=1e-12)

    def exact_gradient(logits):
        law = tree.best_of_n_law(jax.nn.log_softmax(logits), score=jnp.asarray(REWARD), n=2)
        return jnp.exp(law) @ utility

    np.testing.assert_allclose(mean, jax.grad(exact_gradient)(jnp.log(BASE)), atol=1e-9)


@pytest.mark.parametrize(("n", "total"), [(1, 3), (2, 4), (3, 4), (4, 4)])
def test_weights_of_best_of_n_are_those_of_a_walk_over_all_subsets(n, total):
    rng = np.random.default_rng(n)
    judge, utility = rng.integers(0, 3, total) * 1.0, rng.normal(size=total)  # with ties
    expected = np.zeros(total)
    subsets = list(itertools.combinations(range(total), n))

    def best(members):
        return utility[max(members, key=lambda j: (judge[j], -j))]  # the first among equals

    for members in subsets:
        for i in members:
            others = [j for j in members if j != i]
            expected[i] += (best(members) - (best(others) if others else np.delete(utility, i).mean())) / len(subsets)
    log_prob = jnp.zeros(total)
    found = jax.grad(lambda x: shaping.best_of_score(x, judge=judge, utility=utility, n=n))(log_prob)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    if n == 1:
        np.testing.assert_allclose(
            found, jax.grad(lambda x: shaping.score_function(x, utility=utility))(log_prob), atol=1e-12
        )


def test_many_draws_do_not_overflow():
    judge, utility = jnp.asarray(normal(0, 700)), jnp.asarray(normal(1, 700))
    found = jax.grad(lambda x: shaping.best_of_score(x, judge=judge, utility=utility, n=300))(judge)
    assert np.isfinite(found).all()
    assert abs(float(shaping.best_of_utility(judge, utility=judge, n=300)) - float(jnp.sort(judge)[-3:].mean())) < 0.2


def test_the_covariance_over_all_pairs_of_draws_is_the_exact_gradient():
    pi = np.exp(gibbs.log_policy(np.log(BASE), REWARD, beta=BETA))
    drawn = np.array(list(itertools.product(range(3), repeat=2)))
    weight = pi[drawn].prod(axis=1)

    def estimate(reward, beta):
        each = jax.vmap(lambda i: shaping.covariance(reward[i], utility=jnp.asarray(UTILITY)[i], beta=beta))
        return weight @ each(drawn)

    exact_gradient = jax.grad(
        lambda r, b: shaping.leader_utility(np.log(BASE), r, utility=UTILITY, beta=b), argnums=(0, 1)
    )
    found = jax.grad(estimate, argnums=(0, 1))(jnp.asarray(REWARD), BETA)
    for a, b in zip(found, exact_gradient(jnp.asarray(REWARD), BETA), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_particles_are_unbiased_for_the_partition_and_not_for_the_utility():
    """E as a tree of one token, 8 particles of the base, 4,000 runs: each mean within 4 of its standard errors, which
    fails once in 16,000; the exact .2137 is 87 errors away."""
    t = tree.Tree(2, 1, eos_id=None)
    params = {"policy": jnp.asarray(E_BASE[None]), "reward": jnp.asarray(E_REWARD), "beta": 1.0}
    found = decoding.smc(
        tree.policy(t),
        tree.reward(t),
        params,
        jax.random.key(3),
        tree.prompts(4000),
        num_particles=8,
        max_new_tokens=1,
        eos_ids=(),
    )
    token = found.info.samples.tokens[..., 0]

    def estimates(reward):
        given = {"log_weight": found.info.log_weight, "utility": jnp.asarray(E_UTILITY)[token]}
        return shaping.smc(jnp.asarray(reward)[token], **given, beta=1.0)

    value, slope = jax.jvp(estimates, (jnp.asarray(E_REWARD),), (jnp.array([0.0, 1.0]),))
    np.testing.assert_allclose(value.log_partition, found.info.log_z, atol=1e-12)
    np.testing.assert_allclose(value.effective_samples, found.info.ess, rtol=1e-9)
    np.testing.assert_allclose(slope.partition.mean(), 2.008554, atol=0.135)
    np.testing.assert_allclose(slope.utility.mean(), 0.092715, atol=0.0055)
    np.testing.assert_allclose(value.utility.mean(), 1.448543, atol=4 * float(value.utility.std()) / 4000**0.5)


@pytest.mark.parametrize("n", [4, 8, 16])
def test_the_self_normalised_estimate_is_biased_towards_no_gain(n):
    """E on n base samples, over the binomial law of how many are good."""
    expected = {4: (1.303642, 0.035223), 8: (1.448543, 0.092715), 16: (1.569376, 0.161272)}[n]
    good = np.arange(n + 1)
    prob = np.exp([_log_binomial(n, int(k), 0.1) for k in good])
    utility = np.where(np.arange(n) < good[:, None], 2.0, 1.0)

    def delivered(high):
        reward = jnp.where(utility > 1, high, 0.0)
        return prob @ shaping.leader_utility(np.zeros(reward.shape), reward, utility=utility, beta=1.0)

    np.testing.assert_allclose(jax.value_and_grad(delivered)(3.0), expected, atol=1e-6)


def _log_binomial(n: int, k: int, p: float) -> float:
    ways = np.log([float(x) for x in range(1, n + 1)]).sum() if n else 0.0
    ways -= np.log(np.arange(1, k + 1)).sum() + np.log(np.arange(1, n - k + 1)).sum()
    return float(ways + k * np.log(p) + (n - k) * np.log(1 - p))


@pytest.mark.parametrize(
    ("base", "reward", "utility", "beta", "along", "expected"),
    [
        (E_BASE, E_REWARD, E_UTILITY, 1.0, (1.0, 2.0), None),
        (np.log(BASE), REWARD, UTILITY, BETA, (1.0, 2.0, 3.0), (0.338270, -0.609043, 0.270773)),
    ],
)
def test_a_hessian_s_product_is_the_derivative_of_the_gradient_in_both_orders(
    base, reward, utility, beta, along, expected
):
    def delivered(r):
        return shaping.leader_utility(base, r, utility=utility, beta=beta)

    r, v = jnp.asarray(reward), jnp.asarray(along)
    forward = jax.jvp(jax.grad(delivered), (r,), (v,))[1]
    np.testing.assert_allclose(forward, jax.grad(lambda x: jax.grad(delivered)(x) @ v)(r), atol=1e-12)
    pi = np.exp(gibbs.log_policy(base, reward, beta=beta))
    u, w = utility - pi @ utility, np.asarray(along) - pi @ np.asarray(along)
    np.testing.assert_allclose(forward, pi * (u * w - pi @ (u * w)) / beta**2, atol=1e-12)
    np.testing.assert_allclose(np.abs(forward) if expected is None else forward, expected or (0.081443,) * 2, atol=1e-6)


def test_constant_utilities_one_value_and_lost_mass_give_zeros_and_no_nan():
    alike = jnp.full((2, 4), 0.1)
    for surrogate in (
        lambda x: shaping.covariance(x, utility=alike, beta=0.3),
        lambda x: shaping.best_of_score(x, judge=x, utility=alike, n=2),
        lambda x: shaping.smc(x, log_weight=10 * x, utility=alike * 10, beta=1.0).utility.sum(),
        lambda x: shaping.soft_pick(x, utility=alike, temperature=1.0),
    ):
        np.testing.assert_allclose(jax.jit(jax.grad(surrogate))(jnp.asarray(normal(0, 2, 4))), 0, atol=1e-15)
    cut = jnp.array([[[0.0, -1e20], [-0.7, -0.7]]])
    found = jax.grad(
        lambda x: shaping.all_tokens(
            x,
            q=jnp.array([[[1.0, jnp.nan], [1.0, 2.0]]]),
            log_prob=x[..., 0],
            chosen_q=jnp.array([[1.0, jnp.nan]]),
            utility=jnp.array([2.0]),
            mask=jnp.array([[True, False]]),
        )
    )(cut)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0, 1], 0)


FOUR = np.zeros((2, 4))
REFUSED = {
    "utility: expected at least 2 draws": lambda: shaping.covariance(FOUR[:, :1], utility=FOUR[:, :1], beta=1.0),
    "reward: expected the shape of utility": lambda: shaping.covariance(FOUR[:, :3], utility=FOUR, beta=1.0),
    "beta: expected a value > 0": lambda: shaping.covariance(FOUR, utility=FOUR, beta=0.0),
    "utility: expected at least 3 draws": lambda: shaping.best_of_score(
        FOUR[:, :2], judge=FOUR[:, :2], utility=FOUR[:, :2], n=3
    ),
    "n: expected at least 1": lambda: shaping.best_of_score(FOUR, judge=FOUR, utility=FOUR, n=0),
    "judge: expected the shape of utility": lambda: shaping.best_of_score(FOUR, judge=FOUR[0], utility=FOUR, n=2),
    "temperature: expected a value > 0": lambda: shaping.soft_pick(FOUR, utility=FOUR, temperature=0.0),
    "log_weight: expected the shape of reward": lambda: shaping.smc(FOUR, log_weight=FOUR[0], utility=FOUR, beta=1.0),
    "q: expected the shape of log_prob": lambda: shaping.togo(FOUR, q=FOUR[0], value=FOUR, mask=FOUR > 0),
    "chosen_q: expected the shape of log_prob": lambda: shaping.all_tokens(
        FOUR[None], q=FOUR[None], log_prob=FOUR[:1, :2], chosen_q=FOUR, utility=FOUR[0, :1], mask=FOUR[:1, :2] > 0
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()

"""The leader's gradient through decoders: each estimator's mean against the exact one, and refusals by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, shaping, tree
from jaxalign.bilevel import leader_gradient
from tests import exact

TREE = tree.Tree(2, 2, eos_id=0)  # responses 0, 10, 11
POLICY, REWARD = tree.policy(TREE), tree.reward(TREE)
TILT = policies.tilt(POLICY, tree.critic(TREE, "level"))
BETA, GROUP = 0.7, 2
BASE = np.log([[0.5, 0.5], [0.6, 0.4], [0.5, 0.5]])
PAID, UTILITY = np.array([0.2, 0.5, 1.0]), np.array([0.0, 1.0, 3.0])
LIMITS = {"max_new_tokens": 2, "eos_ids": (0,)}
GIBBS = {"policy": BASE, "reward": PAID, "beta": BETA}
FOLLOWERS = {
    "score": (
        TILT,
        {"policy": BASE, "critic": np.array([[0.3, -0.2], [0.1, 0.6], [0.0, 0.0]]), "beta": BETA},
        "critic",
    ),
    "covariance": (
        functools.partial(decoding.rejection, POLICY, REWARD, max_tries=64, chunk=64),
        GIBBS | {"bound": 1.0},
        "reward",
    ),
    "closed_form": (
        functools.partial(decoding.rejection, POLICY, REWARD, max_tries=64),
        GIBBS | {"bound": 1.0},
        "reward",
    ),
    "smc": (functools.partial(decoding.smc, POLICY, REWARD, num_particles=4), GIBBS, "reward"),
    "best_of_score": (
        functools.partial(decoding.best_of_n, POLICY, REWARD, num_samples=GROUP),
        {"policy": BASE, "reward": PAID},
        "policy",
    ),
    "soft_pick": (
        functools.partial(decoding.best_of_n, POLICY, REWARD, num_samples=GROUP),
        {"policy": BASE, "reward": PAID},
        "reward",
    ),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def floats(params):
    return jax.tree.map(lambda x: jnp.asarray(x, float), params)


def estimate(name: str, seed: int, *, prompts: int = 200, samples: int = 4, **changes):
    follower, params, wrt = FOLLOWERS[name]
    given = {"follower": floats(params), "utility": jnp.asarray(UTILITY)}
    options = {"wrt": wrt, "estimator": name, "samples": samples, "temperature": BETA} | LIMITS | changes
    return leader_gradient(follower, REWARD, given, jax.random.key(seed), tree.prompts(prompts), **options)


def law(table):
    return jnp.exp(tree.response_log_prob(TREE, jax.nn.log_softmax(table)))


def exact_utility(name: str):
    """U as a function of what is differentiated; None where the estimate has a bias of its own."""
    _, params, _ = FOLLOWERS[name]
    base = tree.response_log_prob(TREE, jnp.asarray(BASE))
    pairs = np.array([(i, j) for i in range(3) for j in range(3)])

    def of_pairs(reward, prob):
        weight = jax.nn.softmax(reward[pairs] / BETA, axis=1)
        return prob[pairs].prod(axis=1) @ (weight * UTILITY[pairs]).sum(axis=1)

    def tilted(critic):
        scored = exact.completions(TREE, TILT, floats(params) | {"critic": critic})
        return jnp.exp(scored.log_prob.sum(axis=1)) @ UTILITY

    return {
        "score": tilted,
        "covariance": lambda r: shaping.leader_utility(base, r, utility=UTILITY, beta=BETA),
        "best_of_score": lambda table: (
            jnp.exp(
                tree.best_of_n_law(
                    tree.response_log_prob(TREE, jax.nn.log_softmax(table)), score=jnp.asarray(PAID), n=GROUP
                )
            )
            @ UTILITY
        ),
        "soft_pick": lambda r: of_pairs(r, jnp.exp(base)),
    }.get(name)


@pytest.mark.parametrize("name", ["score", "covariance", "best_of_score", "soft_pick"])
def test_the_mean_of_the_estimates_is_the_exact_value_and_gradient(name):
    """16 estimates of 200 prompts: each number within 5 of its standard errors, which fails once in 6,000 (t, 15
    degrees of freedom; the draws are fixed)."""
    _, params, wrt = FOLLOWERS[name]
    value, gradient = jax.value_and_grad(exact_utility(name))(jnp.asarray(params[wrt]))
    found = [estimate(name, seed) for seed in range(16)]

    def near(drawn, expected):
        drawn = np.stack([np.asarray(x) for x in drawn])
        error = drawn.std(axis=0, ddof=1) / len(drawn) ** 0.5
        assert (np.abs(drawn.mean(axis=0) - expected) <= 5 * error + 1e-12).all(), (drawn.mean(axis=0), expected, error)

    near([x.value for x in found], value)
    near([x.gradient[wrt] for x in found], gradient)
    spread = np.std([x.value for x in found], ddof=1)
    np.testing.assert_allclose(np.mean([x.standard_error for x in found]), spread, rtol=0.6)
    assert np.isfinite([x.kl for x in found]).all()
    assert found[0].effective_samples == {"best_of_score": 2, "soft_pick": 2}.get(name, 4)


def test_weighted_estimates_agree_with_each_other_and_tell_what_they_rest_on():
    """One step of resampling is none: particles of the base are the self-normalised base samples, bias included."""
    smc, closed = (
        np.stack([estimate(name, s).gradient["reward"] for s in range(12)]) for name in ("smc", "closed_form")
    )
    error = (smc.var(axis=0, ddof=1) / 12 + closed.var(axis=0, ddof=1) / 12) ** 0.5
    assert (np.abs(smc.mean(axis=0) - closed.mean(axis=0)) < 5 * error).all()
    for name in ("smc", "closed_form"):
        found = estimate(name, 0)
        assert 1 < found.effective_samples < 4
        assert 0 < found.kl < np.log(4)
        assert found.standard_error > 0


def test_beta_is_a_leader_s_parameter_too():
    found = [estimate("covariance", seed, wrt=("reward", "beta")) for seed in range(12)]
    base = tree.response_log_prob(TREE, jnp.asarray(BASE))
    slope = jax.grad(lambda b: shaping.leader_utility(base, PAID, utility=UTILITY, beta=b))(BETA)
    drawn = np.array([x.gradient["beta"] for x in found])
    assert abs(drawn.mean() - slope) < 5 * drawn.std(ddof=1) / 12**0.5
    assert found[0].gradient["reward"].shape == (3,)


@pytest.mark.parametrize("name", ["covariance", "closed_form", "smc", "soft_pick"])
def test_the_leader_of_two_responses_pays_the_bound_through_each_follower(name):
    """Base (.9, .1), u (1, 2), rewards in [0, 3]: the optimum is r_2 − r_1 = 3."""
    t = tree.Tree(2, 1, eos_id=None)
    policy, reward = tree.policy(t), tree.reward(t)
    follower = {
        "covariance": functools.partial(decoding.rejection, policy, reward, max_tries=256, chunk=256),
        "closed_form": functools.partial(decoding.rejection, policy, reward, max_tries=1),
        "smc": functools.partial(decoding.smc, policy, reward, num_particles=8),
        "soft_pick": functools.partial(decoding.best_of_n, policy, reward, num_samples=8),
    }[name]
    paid = jnp.array([1.5, 1.5])
    params = {"policy": jnp.log(jnp.array([[0.9, 0.1]]))}
    params |= {} if name == "soft_pick" else {"beta": jnp.asarray(1.0)}
    params |= {"bound": jnp.asarray(3.0)} if name in ("covariance", "closed_form") else {}
    for step in range(12):
        found = leader_gradient(
            follower,
            reward,
            {"follower": params | {"reward": paid}, "utility": jnp.array([1.0, 2.0])},
            jax.random.key(step),
            tree.prompts(64),
            wrt="reward",
            estimator=name,
            samples=8,
            max_new_tokens=1,
            eos_ids=(),
        )
        paid = jnp.clip(paid + 8 * found.gradient["reward"], 0, 3)
    np.testing.assert_allclose(paid, (0, 3), atol=1e-9)


def test_a_follower_without_a_derivative_and_what_does_not_fit_are_named():
    judge = functools.partial(decoding.best_of_n, POLICY, REWARD, num_samples=2)
    plain = {"policy": floats(BASE), "reward": floats(PAID)}

    def run(follower, params, **changes):
        given = {"wrt": "reward", "estimator": "soft_pick", "samples": 4} | LIMITS | changes
        return leader_gradient(
            follower,
            REWARD,
            {"follower": params, "utility": floats(UTILITY)},
            jax.random.key(0),
            tree.prompts(2),
            **given,
        )

    gibbs = floats(GIBBS | {"bound": 1.0})
    greedy = functools.partial(decoding.sample, POLICY, temperature=0.0)
    beam = functools.partial(decoding.beam, POLICY, REWARD)
    rejection = functools.partial(decoding.rejection, POLICY, REWARD, max_tries=1)
    nan = {"follower": plain, "utility": jnp.array([0.0, jnp.nan, 1.0])}
    for message, call in {
        "hard pick has derivative 0": lambda: run(judge, plain, estimator="best_of_score"),
        "greedy decoding has no derivative": lambda: run(greedy, floats(BASE), wrt=""),
        "expected one with a derivative, found decoding.beam": lambda: run(beam, plain),
        "estimator: expected score for a Policy, found smc": lambda: run(POLICY, floats(BASE), wrt="", estimator="smc"),
        "estimator: expected covariance or closed_form for decoding.rejection": lambda: run(rejection, gibbs),
        "estimator: expected one of": lambda: run(judge, plain, estimator="reinforce"),
        "wrt: expected entries under reward or beta": lambda: run(
            rejection, gibbs, estimator="covariance", wrt="policy"
        ),
        "'policy/nothing': 'nothing' is not in": lambda: run(
            judge, plain, wrt="policy/nothing", estimator="best_of_score"
        ),
        "samples: expected at least 2": lambda: run(judge, plain, samples=1),
        "samples: expected a multiple": lambda: run(judge, plain, samples=3),
        "max_tries: expected all draws to be accepted": lambda: run(rejection, gibbs, estimator="covariance"),
        "utility: expected numbers, found NaN": lambda: leader_gradient(
            judge,
            REWARD,
            nan,
            jax.random.key(0),
            tree.prompts(9),
            wrt="reward",
            estimator="soft_pick",
            samples=4,
            **LIMITS,
        ),
        "follower: expected a Policy or a functools.partial": lambda: run(REWARD, plain),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()

"""The leader's gradient with values of its utility, and through the law that a few particles emit."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, tree
from jaxalign.bilevel import _population, leader_gradient
from jaxalign.decoding import resampling
from tests import exact

TREE = tree.Tree(2, 2, eos_id=0)  # responses 0, 10, 11
POLICY, REWARD, LEVEL = tree.policy(TREE), tree.reward(TREE), tree.critic(TREE, "level")
TILT = policies.tilt(POLICY, LEVEL)
BASE = np.log([[0.5, 0.5], [0.6, 0.4], [0.5, 0.5]])
PARAMS = {"policy": BASE, "critic": np.array([[0.3, -0.2], [0.1, 0.6], [0.0, 0.0]]), "beta": 0.7}
UTILITY, LIMITS = np.array([0.0, 1.0, 3.0]), {"max_new_tokens": 2, "eos_ids": (0,)}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def floats(params):
    return jax.tree.map(lambda x: jnp.asarray(x, float), params)


def law(critic):
    found = exact.completions(TREE, TILT, floats(PARAMS) | {"critic": critic})
    return jnp.exp(found.log_prob.sum(axis=1))


def values():
    """Q_u [S,V] of the follower: u of the response, and after the token 1 what is expected of it."""
    second = jnp.asarray(PARAMS["critic"])[2] / PARAMS["beta"] + BASE[2]
    later = jax.nn.softmax(second) @ UTILITY[1:]
    return jnp.array([[UTILITY[0], later], [0.0, 0.0], [UTILITY[1], UTILITY[2]]])


def estimate(seed, estimator, q, *, prompts=200):
    found = leader_gradient(
        TILT,
        REWARD,
        {"follower": floats(PARAMS), "utility": jnp.asarray(UTILITY), "values": q},
        jax.random.key(seed),
        tree.prompts(prompts),
        wrt="critic",
        estimator=estimator,
        samples=4,
        values=None if q is None else LEVEL,
        **LIMITS,
    )
    return np.asarray(found.gradient["critic"])


def test_values_of_the_utility_leave_the_mean_and_lower_the_variance():
    """16 estimates of 200 prompts: each number within 5 of its standard errors."""
    wanted = jax.grad(lambda c: law(c) @ UTILITY)(jnp.asarray(PARAMS["critic"]))
    wrong = values() + 0.5 * jnp.cos(jnp.arange(6.0)).reshape(3, 2)
    cases = {
        "score": ("score", None),
        "wrong": ("all_tokens", wrong),
        "togo": ("togo", values()),
        "exact": ("all_tokens", values()),
    }
    variance = {}
    for name, (estimator, q) in cases.items():
        drawn = np.stack([estimate(seed, estimator, q) for seed in range(16)])
        error = drawn.std(axis=0, ddof=1) / 4
        assert (np.abs(drawn.mean(axis=0) - wanted) <= 5 * error + 1e-12).all(), name
        variance[name] = drawn.var(axis=0, ddof=1).sum()
    # The correction has the noise of what comes after a token, which values alone do not.
    assert variance["togo"] < variance["exact"] < variance["wrong"] < variance["score"]


def population(critic, paid, trace=None, seed=0):
    params = floats(PARAMS) | {"critic": critic}
    found = _population.population(
        TILT,
        params,
        jax.random.key(seed),
        tree.prompts(1),
        n=2,
        steps=2,
        eos_ids=(0,),
        threshold=1.01,  # always
        trace=trace,
    )
    place = jnp.where(found.tokens[:, 0] == 0, 0, 1 + found.tokens[:, 1])
    return found, paid[place][None], jnp.asarray(UTILITY)[place][None]


def every_trace():
    """All choices of two particles of up to two tokens that are resampled before each."""
    one = list(itertools.product((0, 1), repeat=2))
    for first, second in itertools.product(one, one):
        for tokens in itertools.product((0, 1), repeat=2):
            ended = np.array(tokens) == 0
            moved = ended[list(second)]
            for later in itertools.product(*[(-1,) if done else (0, 1) for done in moved]):
                yield (
                    np.array([[False, False], ended]),
                    np.array([[first], [second]]),
                    np.array([tokens, later], np.int32),
                )


def test_the_law_of_a_few_particles_is_differentiated_in_draws_and_ancestors():
    """Against the enumeration of all choices, which decoding.smc agrees with, and not the gradient of the limit."""
    traces = list(every_trace())
    stacked = _population.Trace(*(jnp.asarray(np.stack(x)) for x in zip(*traces, strict=True)))
    paid, beta = jnp.array([0.2, 0.5, 1.0]), PARAMS["beta"]

    def emitted(critic, paid):
        def one(trace):
            found, reward, u = population(critic, paid, trace)
            share = jax.nn.softmax(found.log_weight + reward / beta, axis=1)
            return jnp.exp(found.log_prob[0]), (share * u).sum()

        prob, value = jax.vmap(one)(stacked)
        return prob @ value, prob.sum()

    both = jnp.asarray(PARAMS["critic"]), paid
    (value, total), slopes = jax.jit(jax.value_and_grad(emitted, argnums=(0, 1), has_aux=True))(*both)
    np.testing.assert_allclose(total, 1, atol=1e-12)
    follower = functools.partial(decoding.smc, TILT, REWARD, num_particles=2)
    given = {"policy": floats(PARAMS), "reward": paid, "beta": jnp.asarray(beta), "ess_threshold": jnp.asarray(1.0)}
    direct = follower(
        given, jax.random.key(5), tree.prompts(4000), scheme=resampling.multinomial, when=resampling.always, **LIMITS
    )
    tokens = np.asarray(direct.completions.tokens)
    drawn = UTILITY[np.where(tokens[:, 0] == 0, 0, 1 + tokens[:, 1])]
    assert abs(drawn.mean() - value) < 5 * drawn.std() / 4000**0.5
    # Resampled below two effective particles of two: always but where the weights are equal, when it changes nothing.
    found = [
        leader_gradient(
            follower,
            REWARD,
            {"follower": given, "utility": jnp.asarray(UTILITY)},
            jax.random.key(seed),
            tree.prompts(200),
            wrt=("policy/critic", "reward"),
            estimator="smc_law",
            samples=8,
            **LIMITS,
        )
        for seed in range(16)
    ]
    assert found[0].effective_samples == 4
    for path, wanted in zip(("policy/critic", "reward"), slopes, strict=True):
        each = np.stack([np.asarray(x.gradient[path]) for x in found])
        error = each.std(axis=0, ddof=1) / 4
        assert (np.abs(each.mean(axis=0) - wanted) <= 5 * error + 1e-12).all(), path
    each = np.array([x.value for x in found])
    assert abs(each.mean() - value) < 5 * each.std(ddof=1) / 4


def test_what_does_not_fit_is_named():
    smc = functools.partial(decoding.smc, TILT, REWARD, num_particles=2)
    gibbs = {"policy": floats(PARAMS), "reward": jnp.zeros(3), "beta": jnp.asarray(1.0)}

    def run(follower, params, **changes):
        given = {"wrt": "", "estimator": "all_tokens", "samples": 4} | LIMITS | changes
        both = {"follower": params, "utility": jnp.asarray(UTILITY), "values": values()}
        return leader_gradient(follower, REWARD, both, jax.random.key(0), tree.prompts(2), **given)

    plain = floats(PARAMS)
    systematic = functools.partial(decoding.smc, TILT, REWARD, num_particles=2, scheme=resampling.systematic)
    law = {"estimator": "smc_law", "wrt": "reward"}
    for message, call in {
        "values: expected a Critic of the utility with togo": lambda: run(TILT, plain, estimator="togo"),
        "values: expected a level critic": lambda: run(TILT, plain, values=critics.increment_of(LEVEL)),
        "values: expected with all_tokens or togo": lambda: run(TILT, plain, values=LEVEL, estimator="score"),
        "values: expected a Critic": lambda: run(TILT, plain, values=POLICY),
        "one by one .* found <function systematic": lambda: run(systematic, gibbs, **law),
        "num_particles: expected an integer, found None": lambda: run(
            functools.partial(decoding.smc, TILT, REWARD), gibbs, **law
        ),
        "samples: expected at least 4": lambda: run(smc, gibbs, samples=2, **law),
        "samples: expected a multiple of a population's 2": lambda: run(smc, gibbs, samples=5, **law),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()

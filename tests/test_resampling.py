"""Resampling schemes against their exact expectations, the parts of SMC, and the KL of draws that are tried."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, tree
from jaxalign.decoding import resampling, stopping
from jaxalign.types import StepOutput
from tests import exact
from tests.sampling import assert_mean

RNG = jax.random.key(0)
TREE = tree.Tree(3, 3, eos_id=0)
SCHEMES = {name: getattr(resampling, name) for name in ("systematic", "stratified", "multinomial", "residual")}
WEIGHT = jnp.log(jnp.array([0.05, 0.3, 0.0, 0.4, 0.25]))


@pytest.mark.parametrize("name", SCHEMES)
def test_children_have_their_exact_mean_and_limits(name):
    """20,000 resamplings of five particles: N·p children in the mean, within 5 standard errors, none without mass, and
    the scheme's own limits for each; multinomial has the binomial's variance."""
    keys = jax.random.split(RNG, 20_000)
    index = np.asarray(SCHEMES[name](keys, jnp.broadcast_to(WEIGHT, (20_000, 5))))
    children = (index[..., None] == np.arange(5)).sum(axis=1)
    expected = 5 * np.exp(np.asarray(WEIGHT))
    np.testing.assert_array_equal(children.sum(axis=1), 5)
    assert (children[:, 2] == 0).all()
    for j in (0, 1, 3, 4):
        spread = children[:, j].std() / np.sqrt(len(children))
        assert abs(children[:, j].mean() - expected[j]) <= 5 * spread + 1e-6, j
    distance = np.abs(children - expected)
    if name == "systematic":
        assert (distance < 1 + 1e-5).all()
    if name == "stratified":
        assert (distance < 2 + 1e-5).all()
    if name == "residual":
        assert (children >= np.floor(expected + 1e-5)).all()
    if name == "multinomial":
        share = expected / 5
        np.testing.assert_allclose(children.var(axis=0), 5 * share * (1 - share), rtol=0.05)


@pytest.mark.parametrize("name", SCHEMES)
def test_z_is_unbiased_under_every_scheme_and_rule(name):
    """6,000 prompts with four particles each and a bad critic: E[Z-hat] = Z within 5 standard errors."""
    base, reward = exact.tables(TREE, 4)
    q = jax.random.normal(jax.random.key(11), (TREE.num_states, TREE.vocab_size))
    tilted = policies.tilt(tree.policy(TREE), tree.critic(TREE, "level"))
    params = decoding.SMCParams({"policy": base, "critic": q, "beta": 1.5}, reward, 0.6)
    for when, resampled in ((resampling.always, True), (resampling.never, False)):
        found = decoding.smc(
            tilted,
            tree.reward(TREE),
            params,
            RNG,
            tree.prompts(6000),
            num_particles=4,
            max_new_tokens=3,
            eos_ids=0,
            scheme=SCHEMES[name],
            when=when,
        )
        assert bool((found.info.resamplings > 0).all()) == resampled
        z = float(np.exp(tree.response_log_prob(TREE, base) + reward / 0.6).sum())
        assert_mean(np.exp(found.info.log_z), z)


def test_the_kl_of_tried_draws_is_unbiased():
    """20,000 rows of a tree: the mean of the KL that rejection and first_above give is the exact one."""
    base, reward = exact.tables(TREE, 4)
    log_base = tree.response_log_prob(TREE, base)
    shared = {"max_tries": 2000, "max_new_tokens": 3, "eos_ids": (0,)}
    prompts = tree.prompts(20_000)
    bound = float(reward.max())
    params = {"policy": base, "reward": reward, "beta": 1.0, "bound": bound}
    found = decoding.rejection(tree.policy(TREE), tree.reward(TREE), params, RNG, prompts, **shared)
    law = jax.nn.log_softmax(log_base + reward)
    assert found.info.accepted.all()
    assert_mean(found.kl.value, float((np.exp(law) * (law - log_base)).sum()))
    threshold = float(np.sort(np.asarray(reward))[10])
    params = {"policy": base, "reward": reward, "reward_threshold": threshold}
    found = decoding.first_above(tree.policy(TREE), tree.reward(TREE), params, RNG, prompts, **shared)
    assert_mean(found.kl.value, -np.log(float(np.exp(log_base)[np.asarray(reward) >= threshold].sum())))


def test_a_scheme_of_another_shape_is_refused():
    base, reward = exact.tables(TREE, 4)
    params = {"policy": base, "reward": reward, "beta": 1.0}
    with pytest.raises(ValueError, match=r"scheme: expected one number for each of \(4, 2\), found shape \(4,\)"):
        decoding.smc(
            tree.policy(TREE),
            tree.reward(TREE),
            params,
            RNG,
            tree.prompts(4),
            num_particles=2,
            max_new_tokens=3,
            eos_ids=0,
            scheme=lambda rng, log_weight: jnp.zeros(len(log_weight), jnp.int32),
        )


def test_stopping_rules_by_hand():
    log_prob = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    output = StepOutput(log_prob, log_prob, jnp.zeros(2))
    np.testing.assert_array_equal(stopping.entropy_reaches(output, jnp.array([0.6, 0.6])), [True, False])
    np.testing.assert_array_equal(stopping.top_probability_below(output, jnp.array([0.6, 0.2])), [True, False])

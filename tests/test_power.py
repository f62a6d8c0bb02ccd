"""Powers of a policy's law over whole responses, by a chain and by particles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, tree
from tests import exact
from tests.sampling import assert_mean, chi_square, index_of

TREE = tree.Tree(3, 2)
BASE, LEVEL = tree.policy(TREE), tree.critic(TREE, "level")
TABLE, Q = exact.tables(TREE, 1)[0], exact.tables(TREE, 2)[0]
LAW = np.exp(np.asarray(tree.response_log_prob(TREE, TABLE)))


def drawn(policy, params, size=4000, **given):
    return decoding.power(policy, params, jax.random.key(1), tree.prompts(size), max_new_tokens=2, **given)


@pytest.mark.parametrize("alpha", [3.0, 0.4])
def test_a_chain_tends_to_the_power(alpha):
    """The law after 24 moves of 4,000 chains; 7 responses, of whose statistic 33 has a probability below 1e-5."""
    found = drawn(BASE, TABLE, alpha=alpha, num_steps=24)
    assert chi_square(index_of(TREE, found.completions), LAW**alpha / (LAW**alpha).sum()) < 33
    assert chi_square(index_of(TREE, found.completions), LAW) > 100


@pytest.mark.parametrize("alpha", [3.0, 0.4])
def test_particles_have_the_sum_of_powers_as_their_mean_weight(alpha):
    """Of a tilt, whose own law is raised and not its base's."""
    tilted = policies.tilt(BASE, LEVEL)
    params = policies.TiltParams(TABLE, Q, 0.8)
    law = np.exp(exact.log_law(TREE, tilted, params))
    found = drawn(tilted, params, alpha=alpha, by="smc", num_particles=4)
    assert_mean(np.exp(np.asarray(found.info.log_z)), (law**alpha).sum())
    assert not np.allclose((law**alpha).sum(), (LAW**alpha).sum(), rtol=0.02)


def test_each_prompt_has_its_own_power():
    alpha = jnp.tile(jnp.array([1.5, 4.0]), 1000)
    found = drawn(BASE, TABLE, 2000, alpha=alpha, by="smc", num_particles=8)
    z = np.exp(np.asarray(found.info.log_z)).reshape(-1, 2)
    assert_mean(z, [(LAW**1.5).sum(), (LAW**4.0).sum()])


def test_what_is_refused():
    for given, match in (
        ({"alpha": 1.0, "num_steps": 2}, "alpha: expected finite numbers > 0 other than 1, found 1.0"),
        ({"alpha": 0.0, "num_steps": 2}, "alpha: expected finite numbers > 0 other than 1, found 0.0"),
        ({"alpha": [0.5, 2.0], "num_steps": 2}, "alpha: expected all above 1 or all below it"),
        ({"alpha": 2.0, "by": "mcmc", "num_steps": 2}, "by: expected 'quest' or 'smc', found 'mcmc'"),
        ({"alpha": 2.0}, "num_steps: expected it alone with by='quest', found neither"),
        (
            {"alpha": 2.0, "by": "smc", "num_steps": 2},
            "num_particles: expected it alone with by='smc'",
        ),
        ({"alpha": [2.0, 3.0, 4.0], "num_steps": 2}, r"alpha: expected .*\(2,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            drawn(BASE, TABLE, 2, **given)
    with pytest.raises(ValueError, match="alpha: expected numbers that are known before tracing"):
        jax.jit(lambda a: drawn(BASE, TABLE, 2, alpha=a, num_steps=2).completions.tokens)(2.0)
    both = {"policy": tree.prompts(2), "critic": tree.prompts(2)}
    with pytest.raises(ValueError, match="prompts: expected one TokenBatch, found a dict of several"):
        decoding.power(BASE, TABLE, jax.random.key(1), both, alpha=2.0, num_steps=2, max_new_tokens=2)

"""The files of examples/gallery, and what the tests of their laws share."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import tree
from tests.sampling import chi_square, index_of
from tests.write_methods import FILES as PATHS

FILES = {path.stem: path for path in PATHS}
TREE = tree.Tree(3, 3)
BASE, LEVEL = tree.policy(TREE), tree.critic(TREE, "level")
ONE = tree.Tree(3, 1, eos_id=None)
FROM_ONE, REWARD_ONE = tree.policy(ONE), tree.reward(ONE)
P, R = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])


def module(name):
    """A file of the gallery, as `--method file:build` imports it."""
    spec = importlib.util.spec_from_file_location(f"gallery_{name}", FILES[name])
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def normalised(x):
    return jax.nn.log_softmax(jnp.asarray(x, jnp.float32))


@pytest.fixture(scope="module")
def tables():
    """Tree C: base, draft and q of 13 states, in this order."""
    draw = np.random.default_rng(11)
    base, draft, q = (draw.normal(size=(13, 3)) for _ in range(3))
    return normalised(base), normalised(draft), jnp.asarray(q, jnp.float32)


def law(table):
    return np.asarray(tree.response_log_prob(TREE, normalised(table)))


def close(found, expected, atol=1e-5):
    np.testing.assert_allclose(np.exp(found), np.exp(expected), atol=atol)


def drawn(decode, policy_tree, size=4000):
    """The numbers of the responses of so many prompts, which share tables."""
    prompts = tree.prompts(size)
    return decode(jax.random.key(5), prompts, max_new_tokens=policy_tree.horizon)


def assert_law(found, expected, t=TREE, most=45):
    """Pearson's statistic of draws against a law of at most 16 cells: 45 has a probability of 1e-4 under it."""
    assert chi_square(index_of(t, found), np.exp(expected)) < most


def exact_last(q):
    """q of each response's last token, its terminal reward."""
    tokens, mask = TREE.responses
    last = mask.sum(1) - 1
    rows = np.arange(len(tokens))
    return np.asarray(q)[TREE.nodes[rows, last], tokens[rows, last]]

"""A block of tokens read in one pass gives the numbers of steps, whatever the family's positions and windows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models, policies
from jaxalign._blocks import accept_policy, verify_policy
from tests.conftest import padded
from tests.models import families, make_golden

# Rotary, learned and no positions; windows in some layers and in all; capped logits; experts.
NAMES = ["llama", "qwen2_windows", "gemma3", "gpt2", "smollm3", "mixtral"]
PROMPTS = padded([[7, 8, 9, 10, 11], [20, 21], [30, 2, 31], [5]], extra=1)
TOKENS = jnp.array([[3, 14, 15, 9], [2, 6, 5, 3], [27, 18, 28, 18], [31, 41, 5, 9]])
COUNTS = jnp.array([3, 0, 1, 2])
REAL = jnp.array([3, 0, 3, 2])
RNG = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def both(policy, params):
    """Outputs of a block, the output of a step after some of it, and outputs of steps, [S,B,V] each."""
    state, _ = policy.init(params, RNG, PROMPTS, 5)

    def step(state, token):
        state, output = policy.step(params, RNG, state, token)
        return state, output.log_prob

    real = jnp.arange(3) < REAL[:, None]
    outputs, proposal = verify_policy(policy, params, RNG, state, TOKENS[:, :3], real)
    accepted = accept_policy(policy, params, proposal, COUNTS)
    following = jnp.take_along_axis(TOKENS, COUNTS[:, None], axis=1)[:, 0]
    return jnp.moveaxis(outputs.log_prob, 1, 0), step(accepted, following)[1], jax.lax.scan(step, state, TOKENS.T)[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_block_gives_the_numbers_of_steps(name):
    lm, params = models.load(make_golden.GOLDEN / name)
    policy = policies.language_model(lm)
    assert policy.verify is not None
    block, after, steps = both(policy, params)
    for b, (real, count) in enumerate(zip(REAL.tolist(), COUNTS.tolist(), strict=True)):
        np.testing.assert_allclose(block[:real, b], steps[:real, b], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(after[b], steps[count, b], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in families.STRETCHED if not name.endswith("_reward")])
def test_frequencies_that_depend_on_the_length_are_read_step_by_step(name):
    """The frequencies of a block's first tokens would be those of its last one, which may be refused."""
    lm, params = models.load(make_golden.GOLDEN / name)
    policy = policies.language_model(lm)
    assert policy.verify is None
    with pytest.warns(UserWarning, match="rotary frequencies change"):
        block, after, steps = both(policy, params)
    np.testing.assert_array_equal(block[:2, 0], steps[:2, 0])
    np.testing.assert_allclose(after, steps[COUNTS, jnp.arange(4)], rtol=2e-5, atol=2e-5)

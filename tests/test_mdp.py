"""The token-level decision process: masks, compaction, transitions, the reward paid once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import mdp, tree
from jaxalign.types import TokenBatch
from tests.conftest import PROMPTS, padded


def test_last_index_is_the_last_true_and_not_the_first():
    mask = jnp.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
    np.testing.assert_array_equal(mdp.last_index(mask), [2, 0, -1, 3])
    np.testing.assert_array_equal(jax.vmap(mdp.last_index)(mask[:, None])[:, 0], [2, 0, -1, 3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_compact_moves_real_tokens_to_the_front(side):
    batch = padded(PROMPTS, side=side, extra=2)
    tokens, mask = jax.jit(mdp.compact)(batch.tokens, batch.mask)
    for b, prompt in enumerate(PROMPTS):
        assert tokens[b].tolist() == prompt + [0] * (6 - len(prompt))
        assert mask[b].tolist() == [True] * len(prompt) + [False] * (6 - len(prompt))


def test_compact_closes_holes():
    tokens, mask = mdp.compact(jnp.array([[5, 6, 7, 8]]), jnp.array([[1, 0, 1, 0]], bool))
    assert tokens.tolist() == [[5, 7, 0, 0]]
    assert mask.tolist() == [[True, True, False, False]]


def test_response_mask_includes_the_first_of_several_eos():
    tokens = jnp.array([[4, 2, 5, 2], [5, 5, 5, 5], [1, 1, 1, 1]])
    np.testing.assert_array_equal(mdp.response_mask(tokens, (2, 5)), [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert mdp.response_mask(tokens, ()).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_concatenate_and_response_part(side):
    prompts = padded(PROMPTS, side=side)
    response = jnp.array([[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 0, 0], [8, 9, 0]])
    real = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)
    tokens, mask, prompt_length = jax.jit(mdp.concatenate)(prompts, response, real)
    part = mdp.response_part(mask, prompt_length)
    for b, prompt in enumerate(PROMPTS):
        expected = response[b][real[b]].tolist()
        assert tokens[b][mask[b]].tolist() == prompt + expected
        assert tokens[b][part[b]].tolist() == expected
    # The same part under left padding of the joined row.
    left = padded([t[m].tolist() for t, m in zip(np.asarray(tokens), np.asarray(mask), strict=True)], side="left")
    part = mdp.response_part(left.mask, prompt_length)
    for b in range(len(PROMPTS)):
        assert left.tokens[b][part[b]].tolist() == response[b][real[b]].tolist()


def test_transition_appends_and_stands_still():
    state = mdp.initial_state(padded(PROMPTS), 2)
    step = jax.jit(lambda s, z: mdp.transition(s, z, eos_ids=(0, 9), max_new_tokens=2))
    state = step(state, jnp.array([1, 0, -1, 9, 2]))
    np.testing.assert_array_equal(state.done, [False, True, False, True, False])
    np.testing.assert_array_equal(state.length, [4, 2, 2, 5, 3])
    frozen = state.tokens[1]
    state = step(state, jnp.array([3, 3, 3, 3, 0]))
    np.testing.assert_array_equal(state.done, [True, True, False, True, True])
    np.testing.assert_array_equal(state.tokens[1], frozen)
    assert state.tokens[0, :5].tolist() == [4, 5, 6, 1, 3]
    assert state.tokens[2, :3].tolist() == [8, 9, 3]
    with pytest.raises(ValueError, match="max_new_tokens"):
        mdp.initial_state(padded(PROMPTS), 0)


@pytest.mark.parametrize("truncation", ["score", "zero"])
def test_the_reward_is_paid_once_at_the_end_by_the_named_rule(truncation):
    """Over every response of a ragged tree: the sum of rewards on the way is the terminal reward, or 0 if truncated."""
    t = tree.Tree(3, 3, eos_id=0)
    tokens, mask = t.responses
    reward = jnp.arange(1.0, t.num_responses + 1)
    prompts = TokenBatch(jnp.full((t.num_responses, 2), 1), jnp.ones((t.num_responses, 2), bool))
    state, paid = mdp.initial_state(prompts, 3), []
    for k in range(4):
        column = jnp.where(mask[:, k], tokens[:, k], -1) if k < 3 else jnp.full(t.num_responses, 1)
        after = mdp.transition(state, column, eos_ids=(0,), max_new_tokens=3)
        paid.append(mdp.terminal_reward(state, after=after, reward=reward, eos_ids=(0,), truncation=truncation))
        state = after
    paid = np.stack(paid)
    ended = (tokens == 0).any(axis=1, where=mask)
    expected = np.where(ended | (truncation == "score"), reward, 0)
    np.testing.assert_array_equal(paid.sum(axis=0), expected)
    assert ((paid != 0).sum(axis=0) <= 1).all()
    assert state.done.all()


def test_truncation_rules_are_named():
    state = mdp.initial_state(padded(PROMPTS), 1)
    with pytest.raises(ValueError, match="truncation"):
        mdp.terminal_reward(state, after=state, reward=jnp.zeros(5), eos_ids=(0,), truncation="half")


def test_trajectory_log_prob_ignores_what_is_masked_and_keeps_gradients_finite():
    log_prob = jnp.array([[-1.0, -2.0, jnp.nan], [-0.5, -jnp.inf, -1.0]])
    mask = jnp.array([[1, 1, 0], [1, 0, 1]], bool)
    np.testing.assert_allclose(mdp.trajectory_log_prob(log_prob, mask=mask), [-3.0, -1.5])
    gradient = jax.grad(lambda x: mdp.trajectory_log_prob(x, mask=mask).sum())(log_prob)
    np.testing.assert_array_equal(gradient, mask)
    assert mdp.trajectory_log_prob(log_prob.astype("bfloat16"), mask=mask).dtype == "float32"

"""Responses that are scored by blocks of tokens get the numbers and the gradients of steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies
from jaxalign._arrays import NEGATIVE
from jaxalign.decoding import _log_prob
from tests.conftest import padded, tiny_lm
from tests.test_speculation import Case
from tests.test_speculation_models import model_cases

NAMES = ["genarm", "values of laws", "nested", "ARGS", "truncated"]
PROMPTS = padded([[4, 5, 6], [7], [8, 9], [1, 2, 10, 4]], extra=1)
STEPS = 7
RNG = jax.random.key(3)
FIELDS = ("log_prob", "log_prob_ref", "log_norm", "kl")


def case_of(name: str) -> Case:
    (lm, params), (reward, rewards) = tiny_lm(0), tiny_lm(5, "reward", num_layers=1)
    base = policies.language_model(lm)
    if name == "ARGS":  # whose critic reads no blocks: the tilt is stepped
        tilted = policies.tilt(base, critics.args(reward), top_k=4)
        return Case(tilted, {"policy": params, "critic": rewards, "beta": jnp.asarray(0.5)})
    if name == "truncated":
        return Case(policies.with_sampling(base, policies.Sampling(0.7, None, 0.8)), params)
    return model_cases()[name][0]


def given(policy, params) -> tuple[jax.Array, jax.Array]:
    """Responses that the policy may draw, of several lengths; the third one is cut to nothing."""
    tokens = decoding.sample(policy, params, RNG, PROMPTS, max_new_tokens=STEPS, eos_ids=()).tokens
    return tokens, jnp.arange(STEPS) < jnp.array([STEPS, 4, 0, 1])[:, None]


def scored(case: Case, tokens, mask, length: int | None, monkeypatch):
    """Completions by blocks of a length, or by steps, and the gradients of a sum of their fields in every leaf."""
    policy = case.policy._replace(log_prob=None)
    if length is None:
        policy = policy._replace(verify=None, accept=None)
    else:
        monkeypatch.setattr(_log_prob, "LONGEST_BLOCK", length)
        _log_prob._log_prob.clear_cache()

    def total(params):
        found = decoding.log_prob(policy, params, RNG, PROMPTS, tokens, mask)
        weights = jnp.cos(jnp.arange(STEPS))
        return sum((getattr(found, name) * weights).sum() for name in FIELDS), found

    gradient, found = jax.grad(total, has_aux=True)(case.params)
    return found, gradient


@pytest.mark.parametrize(("name", "length"), [("genarm", 128), *((name, 3) for name in NAMES)])
def test_blocks_give_the_numbers_and_gradients_of_steps(name, length, monkeypatch):
    case = case_of(name)
    assert case.policy.verify is not None
    tokens, mask = given(case.policy, case.params)
    steps, expected = scored(case, tokens, mask, None, monkeypatch)
    blocks, gradient = scored(case, tokens, mask, length, monkeypatch)
    assert np.asarray(steps.in_support)[[0, 2]].all()
    np.testing.assert_array_equal(blocks.in_support, steps.in_support)
    for field in FIELDS:
        np.testing.assert_allclose(getattr(blocks, field), getattr(steps, field), rtol=2e-4, atol=2e-5)
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True)
    for ours, theirs in leaves:
        size = max(float(jnp.abs(theirs).max()), 1e-3)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-4 * size)


@pytest.mark.parametrize("name", ["ARGS", "truncated"])
def test_nothing_is_scored_after_a_token_of_probability_zero(name, monkeypatch):
    case = case_of(name)
    tokens, mask = given(case.policy, case.params)
    mask = mask.at[1].set(True)
    prefix = decoding.sample(case.policy, case.params, RNG, PROMPTS, max_new_tokens=2, eos_ids=())
    np.testing.assert_array_equal(prefix.tokens, tokens[:, :2])
    outside = np.asarray(_outside(case, tokens))
    tokens = tokens.at[:2, 2].set(outside[:2])
    for length in (None, 3):
        found, gradient = scored(case, tokens, mask, length, monkeypatch)
        np.testing.assert_array_equal(found.in_support, [False, False, True, True])
        np.testing.assert_array_equal(found.log_prob[:2, 2], [np.float32(NEGATIVE)] * 2)
        assert not np.asarray(found.log_prob[:2, 3:]).any()
        assert np.asarray(found.log_prob[:2, :2] > -50).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def _outside(case: Case, tokens):
    """A token of each row that has probability zero after the first two."""
    state, output = case.policy.init(case.params, RNG, PROMPTS, STEPS)
    for t in range(2):
        state, output = case.policy.step(case.params, RNG, state, tokens[:, t])
    assert np.asarray(output.log_prob.min(axis=-1) <= NEGATIVE / 2).all()
    return output.log_prob.argmin(axis=-1)


def test_blocks_are_as_long_as_tokens_and_vocabulary_allow():
    policy = case_of("genarm").policy
    assert _log_prob.block_length(policy, 4, 384, 32) == 32
    assert _log_prob.block_length(policy, 4, 384, 129) == 65  # two of them
    assert _log_prob.block_length(policy, 8, 151_936, 2048) == 3  # 8·3·151936 < 2^22 < 8·4·151936
    assert _log_prob.block_length(policy, 512, 151_936, 2048) == 1
    assert _log_prob.block_length(policy._replace(verify=None), 4, 384, 32) == 1


@pytest.mark.parametrize(("name", "expected"), [("genarm", ["block"] * 2), ("ARGS", ["step"] * 9)])
def test_the_model_is_read_once_for_each_block_or_step(name, expected, monkeypatch):
    """A policy with a part that has to be stepped is stepped as a whole: a block would keep all states on its way. The
    seven steps are in three segments of three."""
    case, runs = case_of(name), []

    def verify(*args):
        jax.debug.callback(lambda: runs.append("block"))
        return case.policy.verify(*args)

    def step(*args):
        jax.debug.callback(lambda: runs.append("step"))
        return case.policy.step(*args)

    counted = case.policy._replace(verify=verify, step=step)
    tokens, mask = given(case.policy, case.params)
    monkeypatch.setattr(_log_prob, "LONGEST_BLOCK", 4)
    jax.block_until_ready(decoding.log_prob(counted, case.params, RNG, PROMPTS, tokens, mask))
    jax.effects_barrier()
    assert runs == expected


def test_a_parallel_form_ends_at_a_token_of_probability_zero_as_steps_do():
    """Logits of -inf and of -1e30, of a user's function that bans tokens."""
    banned = jnp.array([[0, 1, -jnp.inf, 0.5], [0.3, 0, 0.2, -jnp.inf], [0, 0, 0, 0], [1, 1, -1e30, 1.0]])
    policy = policies.from_apply(lambda params, tokens, mask: params[tokens], vocab_size=4)
    prompts = padded([[1, 0], [1], [3]])
    tokens, mask = jnp.array([[2, 1, 1], [0, 1, 3], [2, 1, 1]]), jnp.ones((3, 3), bool)
    for each in (policy, policy._replace(log_prob=None), policies.top_k(policy, 4)):
        found = decoding.log_prob(each, banned, RNG, prompts, tokens, mask)
        expected = [[NEGATIVE, 0, 0], [-0.972919, -0.680270, NEGATIVE], [NEGATIVE, 0, 0]]
        np.testing.assert_allclose(found.log_prob, expected, rtol=1e-5)
        np.testing.assert_allclose(found.log_prob_ref, expected, rtol=1e-5)
        np.testing.assert_array_equal(found.in_support, [False] * 3)
        sums = jax.grad(lambda p, each=each: decoding.log_prob(each, p, RNG, prompts, tokens, mask).log_prob.sum())
        assert np.isfinite(sums(jnp.where(banned < -1e20, -1e20, banned))).all()

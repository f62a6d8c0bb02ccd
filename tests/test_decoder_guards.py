"""What decoders refuse: results of a user's Policy or Critic, params at any depth, prompts that name no row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, tree
from jaxalign.types import TokenBatch
from tests import cases
from tests.conftest import EOS, PROMPTS, padded

RNG = jax.random.key(0)
TABLE, OTHER = cases.table(0), cases.table(5)
BASE, LEVEL, REWARD = tree.policy(cases.TREE), tree.critic(cases.TREE, "level"), tree.reward(cases.TREE)
VALUES = jnp.linspace(0, 1, 1111)
SHARED = {"max_new_tokens": 3, "eos_ids": EOS}


def best_of_n(policy, params=TABLE, prompts=None):
    prompts = padded(PROMPTS) if prompts is None else prompts
    both = {"policy": params, "reward": VALUES}
    return decoding.best_of_n(policy, REWARD, both, RNG, prompts, num_samples=2, **SHARED)


def smc(policy):
    params = {"policy": TABLE, "reward": VALUES, "beta": 1.0}
    return decoding.smc(policy, REWARD, params, RNG, padded(PROMPTS), num_particles=2, **SHARED)


def first_above(policy):
    params = {"policy": TABLE, "reward": VALUES, "reward_threshold": 0.5}
    return decoding.first_above(policy, REWARD, params, RNG, padded(PROMPTS), max_tries=2, **SHARED)


def quest(policy):
    params = {"policy": TABLE, "reward": VALUES, "beta": 1.0}
    return decoding.quest(policy, REWARD, params, RNG, padded(PROMPTS), num_steps=1, **SHARED)


def cards(policy):
    params = {"policy": TABLE, "reward": VALUES, "beta": 1.0, "reward_threshold": 0.5, "entropy_threshold": 0.5}
    return decoding.cards(policy, REWARD, params, RNG, padded(PROMPTS), max_tries=2, **SHARED)


def blockwise(policy, critic=LEVEL):
    params = {"policy": TABLE, "critic": OTHER}
    return decoding.blockwise(policy, critic, params, RNG, padded(PROMPTS), num_samples=2, block_size=1, **SHARED)


def sample(policy):
    return decoding.sample(policy, TABLE, RNG, padded(PROMPTS), **SHARED)


def score(policy):
    tokens = jnp.ones((len(PROMPTS), 3), jnp.int32)
    return decoding.log_prob(policy, TABLE, RNG, padded(PROMPTS), tokens, jnp.ones_like(tokens, bool))


DECODERS = [sample, score, best_of_n, smc, first_above, quest, cards, blockwise]


def changed(function, change):
    """A function whose pair of results is changed."""

    def wrong(*args):
        return change(*function(*args))

    return wrong


def with_log_prob(change):
    return lambda state, output: (state, output._replace(log_prob=change(output.log_prob)))


WRONG = {
    "a vector": (with_log_prob(lambda x: x[0]), r"expected log_prob of shape \(5, V\), found \(\d+,\)"),
    "three axes": (with_log_prob(lambda x: x[:, None]), r"expected log_prob of shape \(5, V\), found \(5, 1, \d+\)"),
    "one row": (with_log_prob(lambda x: x[:1]), r"expected log_prob of shape \(5, V\), found \(1, \d+\)"),
    "integers": (with_log_prob(lambda x: x.astype(int)), "log_prob: expected floating-point numbers"),
    "no pair": (lambda state, output: output.log_prob, r"expected a pair \(state, StepOutput\)"),
    "no output": (lambda state, output: (state, output.log_prob), r"expected \(state, StepOutput\), found"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("decode", DECODERS, ids=lambda f: f.__name__)
def test_what_a_policy_starts_with_is_checked(decode, wrong):
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=rf"policy\.init .*: .*{message}"):
        decode(BASE._replace(init=changed(BASE.init, change), log_prob=None))


def test_a_state_without_the_batch_axis_is_named():
    wrong = changed(BASE.init, lambda state, output: ((state, jnp.zeros(3)), output))
    with pytest.raises(ValueError, match=r"policy\.init .*batch axis \(5\) first, found shape \(3,\) at \[1\]"):
        sample(BASE._replace(init=wrong))


@pytest.mark.parametrize("decode", [sample, score, best_of_n, cards, blockwise], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_log_prob(lambda x: x[0]), r"expected log_prob of shape"),
        (lambda state, output: ((state, state), output), "expected the state to keep its structure"),
        (
            lambda state, output: (jax.tree.map(lambda x: x.astype(jnp.float16), state), output),
            r"expected the state to keep shape .* and dtype .* at .*, found .* and float16",
        ),
    ],
    ids=["a vector", "another state", "another dtype"],
)
def test_what_a_policy_steps_to_is_checked(decode, change, message):
    with pytest.raises(ValueError, match=rf"policy\.step .*: {message}"):
        decode(BASE._replace(step=changed(BASE.step, change), log_prob=None))


def test_an_output_of_another_type_than_the_first_is_named():
    half = changed(BASE.step, lambda state, out: (state, jax.tree.map(lambda x: x.astype(jnp.float16), out)))
    with pytest.raises(ValueError, match=r"policy\.step .*: expected the output to keep .*\.log_prob, .*float16"):
        sample(BASE._replace(step=half))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, proposal: (q[:, 0], proposal), r"q: expected shape \(10, 1\), .*, found \(10,\)"),
        (lambda q, proposal: (q.astype(int), proposal), "q: expected floating-point numbers"),
        (lambda q, proposal: (q, jnp.zeros(3)), "expected every array of the state to have the batch axis"),
        (lambda q, proposal: q, r"expected a pair \(q, proposal\)"),
    ],
    ids=["a vector", "integers", "proposal", "no pair"],
)
def test_what_a_critic_scores_is_checked_by_blockwise(change, message):
    with pytest.raises(ValueError, match=rf"critic\.score .*: {message}"):
        blockwise(BASE, LEVEL._replace(score=changed(LEVEL.score, change)))


def test_errors_of_params_begin_at_the_params_of_the_decoder():
    tilt = policies.tilt(BASE, LEVEL)
    with pytest.raises(ValueError, match=r"params\['policy'\]: expected entries policy, critic, beta"):
        best_of_n(tilt, {"policy": TABLE, "beta": 1.0})
    nested = policies.tilt(tilt, LEVEL)
    with pytest.raises(ValueError, match=r"params\['policy'\]\['policy'\]: expected entries .*missing beta"):
        best_of_n(nested, {"policy": {"policy": TABLE, "critic": OTHER}, "critic": OTHER, "beta": 1.0})
    with pytest.raises(ValueError, match=r"params: expected entries policy, critic, beta"):
        decoding.sample(tilt, {"policy": TABLE}, RNG, padded(PROMPTS), **SHARED)


@pytest.mark.parametrize("row", [-1, 2**31 - 1])
def test_an_index_that_names_no_prompt_is_refused(row):
    index = jnp.array([0, 1, row, 3, 4], jnp.int32)
    with pytest.raises(ValueError, match=r"prompts: expected an index in \[0, 2\^31 - 1\), found"):
        best_of_n(BASE, prompts=padded(PROMPTS)._replace(index=index))


def test_padding_between_real_tokens_is_padding():
    lm, params = cases.tiny_lm(0)
    policy, prompts = policies.language_model(lm), padded(PROMPTS)
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    # Three columns of padding before the last token.
    tokens = np.concatenate([tokens[:, :-1], np.full((len(tokens), 3), 7), tokens[:, -1:]], axis=1)
    mask = np.concatenate([mask[:, :-1], np.zeros((len(mask), 3), bool), mask[:, -1:]], axis=1)
    holes = TokenBatch(jnp.asarray(tokens), jnp.asarray(mask), prompts.index)
    want = decoding.sample(policy, params, RNG, prompts, **SHARED)
    found = decoding.sample(policy, params, RNG, holes, **SHARED)
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_allclose(found.log_prob, want.log_prob, atol=1e-5)

"""What decoders refuse on the host, and what a distribution that is none leaves behind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, rewards, rollout
from jaxalign.types import TokenBatch
from tests.conftest import EOS, VOCAB, padded, tiny_lm

RNG = jax.random.key(0)
SHARED = {"max_new_tokens": 4, "eos_ids": EOS}


def guided():
    """(policy, params) of a GenARM tilt of two tiny models."""
    lm, params = tiny_lm(0)
    arm, arm_params = tiny_lm(4)
    policy = policies.tilt(policies.language_model(lm), critics.genarm(arm))
    return policy, {"policy": params, "critic": arm_params, "beta": jnp.asarray(1.0)}


# Prompts that mirror params -------------------------------------------------------------------------------------------


def test_an_index_given_once_holds_for_every_entry(prompts):
    policy, params = guided()
    index = jnp.array([3, 1, 4, 0, 2])
    plain = decoding.sample(policy, params, RNG, prompts._replace(index=index), **SHARED)
    for given in ("policy", "critic"):
        mirrored = {"policy": prompts, "critic": prompts}
        mirrored[given] = prompts._replace(index=index)
        found = decoding.sample(policy, params, RNG, mirrored, **SHARED)
        np.testing.assert_array_equal(found.tokens, plain.tokens)
    reward_lm, reward_params = tiny_lm(1, "reward")
    lm, own = tiny_lm(0)
    base, reward = policies.language_model(lm), rewards.from_model(reward_lm)
    both = {"policy": own, "reward": reward_params}
    plain = decoding.best_of_n(base, reward, both, RNG, prompts._replace(index=index), num_samples=3, **SHARED)
    for mirrored in ({"policy": prompts, "reward": prompts._replace(index=index)},):
        found = decoding.best_of_n(base, reward, both, RNG, mirrored, num_samples=3, **SHARED)
        np.testing.assert_array_equal(found.info.samples.tokens, plain.info.samples.tokens)


def test_entries_that_disagree_are_refused(prompts):
    policy, params = guided()
    with pytest.raises(ValueError, match=r"prompts\['policy'\]: expected 4 prompts as in prompts\['critic'\], found 5"):
        decoding.sample(
            policy, params, RNG, {"policy": prompts, "critic": jax.tree.map(lambda x: x[:4], prompts)}, **SHARED
        )
    order = jnp.arange(5)
    mirrored = {"policy": prompts._replace(index=order), "critic": prompts._replace(index=order[::-1])}
    with pytest.raises(ValueError, match=r"prompts\['policy'\]: expected the index of prompts\['critic'\]"):
        decoding.sample(policy, params, RNG, mirrored, **SHARED)
    with pytest.raises(ValueError, match=r"prompts\['critic'\]: expected a TokenBatch, found"):
        decoding.sample(policy, params, RNG, {"policy": prompts, "critic": jnp.ones((5, 2))}, **SHARED)


# Parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["beta", "temperature", "top_p"])
def test_numbers_per_prompt_of_the_wrong_shape_are_refused_before_tracing(name, prompts):
    lm, params = tiny_lm(0)
    base = policies.language_model(lm)
    build = {"beta": guided, "temperature": lambda: (policies.temperature(base), {"policy": params})}
    build["top_p"] = lambda: (policies.top_p(base), {"policy": params})
    policy, arguments = build[name]()
    message = rf"{name}: expected a scalar or shape \(5,\), one per prompt, found shape \(4,\)"
    with pytest.raises(ValueError, match=message):
        policy.check({**arguments, name: jnp.full(4, 0.5)}, prompts, 4)
    missing = {key: value for key, value in arguments.items() if key != name}
    with pytest.raises(ValueError, match=rf"params: expected entries .*; found .* \(missing {name}\)"):
        policy.check(missing, prompts, 4)
    with pytest.raises(ValueError, match=r"params: expected entries .*; found .* \(missing policy[;)]"):
        policy.check({name: jnp.asarray(0.5), "critic": None}, prompts, 4)


def test_a_classifier_is_no_policy():
    lm, _ = tiny_lm(1, "reward")
    for build in (policies.language_model, critics.genarm, rewards.log_likelihood):
        with pytest.raises(ValueError, match="expected a language model, found a sequence classifier"):
            build(lm)


def test_tokens_outside_the_vocabulary_are_refused(prompts):
    lm, params = tiny_lm(0)
    mask = jnp.ones((5, 2), bool)
    for bad in (-1, VOCAB):
        tokens = jnp.full((5, 2), 3).at[2, 1].set(bad)
        with pytest.raises(ValueError, match=r"tokens: expected ids in \[0, 11\)"):
            decoding.log_prob(policies.language_model(lm), params, RNG, prompts, tokens, mask)
        # Behind the mask any id may stand.
        decoding.log_prob(policies.language_model(lm), params, RNG, prompts, tokens, mask.at[2, 1].set(False))
    with pytest.raises(ValueError, match="tokens: expected one response per prompt, 5, found 4"):
        decoding.log_prob(policies.language_model(lm), params, RNG, prompts, tokens[:4], mask[:4])


# Rewards --------------------------------------------------------------------------------------------------------------


def test_best_of_n_refuses_a_reward_that_does_not_fit(prompts):
    lm, params = tiny_lm(0)
    base = policies.language_model(lm)

    def select(reward, reward_params, inputs=prompts, **changes):
        both = {"policy": params, "reward": reward_params}
        return decoding.best_of_n(base, reward, both, RNG, inputs, **{"num_samples": 2, **SHARED, **changes})

    other, other_params = tiny_lm(1, "reward", vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match="reward: expected the policy's vocabulary of 11 tokens, found 12"):
        select(rewards.from_model(other), other_params)
    short, short_params = tiny_lm(1, "reward", max_length=6)
    for wrap, arguments in (
        (lambda r: r, short_params),
        (lambda r: rewards.weighted_sum([r]), {"rewards": [short_params], "weights": jnp.ones(1)}),
        (lambda r: rewards.map_reward(r, lambda p, x, i: x), {"reward": short_params, "map": None}),
    ):
        with pytest.raises(ValueError, match="reward's prompts: expected prompt and new tokens within the model's"):
            select(wrap(rewards.from_model(short)), arguments)
    fits, fit_params = tiny_lm(1, "reward")
    summed = rewards.weighted_sum([rewards.from_model(fits)] * 2)
    with pytest.raises(ValueError, match="weights: expected 2 weights and as many params"):
        select(summed, {"rewards": [fit_params] * 2, "weights": jnp.ones(3)})
    with pytest.raises(ValueError, match="weights: expected finite numbers"):
        select(summed, {"rewards": [fit_params] * 2, "weights": jnp.array([1, jnp.nan])})
    with pytest.raises(ValueError, match=r"rewards: expected one vocabulary, found \[11, 12\]"):
        rewards.weighted_sum([rewards.from_model(fits), rewards.from_model(other)])
    with pytest.raises(ValueError, match=r"prompts\['reward'\]: expected one TokenBatch, found list"):
        select(summed, {"rewards": [fit_params] * 2, "weights": jnp.ones(2)}, {"policy": prompts, "reward": [prompts]})
    with pytest.raises(ValueError, match=r"params: expected entries .*\(missing reward\)"):
        decoding.best_of_n(base, summed, {"policy": params}, RNG, prompts, num_samples=2, **SHARED)
    broken = rewards.from_numpy(lambda t, m, p, i: np.where(i == 3, np.nan, 0.0))
    with pytest.raises(ValueError, match=r"reward: expected numbers, found NaN for prompts \[3\]"):
        select(broken, None)
    forbidden = rewards.from_numpy(lambda t, m, p, i: np.where(np.arange(len(i)) % 2 == 0, -np.inf, 1.0))
    np.testing.assert_array_equal(select(forbidden, None).info.reward, [[-np.inf, 1]] * 5)
    with pytest.raises(ValueError, match="chunk: expected a divisor of num_samples = 2, found 3"):
        select(rewards.from_model(fits), fit_params, chunk=3)


def test_numpy_rewards_keep_float64():
    with jax.enable_x64(True):
        reward = rewards.from_numpy(lambda t, m, p, i: np.full(len(i), 1 + 1e-12))
        tokens = jnp.ones((2, 3), jnp.int32)
        found = jax.jit(reward)(None, tokens, tokens > 0, jnp.ones(2, jnp.int32), jnp.arange(2))
        assert found.dtype == jnp.float64
        np.testing.assert_array_equal(found, 1 + 1e-12)


# What is no distribution shows ----------------------------------------------------------------------------------------


def test_nan_weights_show_in_log_prob_and_kl(prompts):
    lm, params = tiny_lm(0)
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    drawn = decoding.sample(policies.language_model(lm), broken, RNG, prompts, **SHARED)
    assert np.isnan(np.asarray(drawn.log_prob)[np.asarray(drawn.mask)]).all()
    assert np.isnan(np.asarray(drawn.kl)[np.asarray(drawn.mask)]).all()
    scored = decoding.log_prob(
        policies.temperature(policies.language_model(lm)),
        {"policy": broken, "temperature": 2.0},
        RNG,
        prompts,
        drawn.tokens,
        drawn.mask,
    )
    assert np.isnan(np.asarray(scored.log_prob)[:, 0]).all()


@pytest.mark.parametrize("critic", ["genarm", "args"])
def test_a_rollout_past_the_cache_is_nan(critic, prompts):
    """A state holds what max_new_tokens asked for; one token more has nothing to be attended by."""
    lm, params = tiny_lm(0)
    head, head_params = tiny_lm(4, None if critic == "genarm" else "reward")
    policy = policies.tilt(policies.language_model(lm), getattr(critics, critic)(head), top_k=3)
    arguments = {"policy": params, "critic": head_params, "beta": jnp.asarray(1.0)}
    state, output = policy.init(arguments, RNG, prompts, 2)
    state, output, inside, _ = rollout.rollout(policy, arguments, RNG, state, output, steps=2, eos_ids=())
    assert np.isfinite(inside.log_prob).all()
    full = np.asarray(prompts.mask).sum(axis=1) == prompts.mask.shape[1]
    beyond = rollout.rollout(policy, arguments, RNG, state, output, steps=2, eos_ids=()).completions
    assert np.isnan(np.asarray(beyond.log_prob)[full, 1]).all()
    assert np.isfinite(np.asarray(beyond.log_prob)[~full]).all()  # shorter prompts have slots left


# Best of n ------------------------------------------------------------------------------------------------------------


def test_sample_j_depends_on_j_alone(prompts):
    lm, params = tiny_lm(0)
    reward_lm, reward_params = tiny_lm(1, "reward")
    base, reward = policies.language_model(lm), rewards.from_model(reward_lm)
    both = {"policy": params, "reward": reward_params}
    six = decoding.best_of_n(base, reward, both, RNG, prompts, num_samples=6, **SHARED)
    for n in (1, 2, 3):
        few = decoding.best_of_n(base, reward, both, RNG, prompts, num_samples=n, **SHARED)
        np.testing.assert_array_equal(few.info.samples.tokens, six.info.samples.tokens[:, :n])
    one = decoding.sample(base, params, RNG, prompts, **SHARED)
    np.testing.assert_array_equal(one.tokens, six.info.samples.tokens[:, 0])
    assert (np.asarray(six.info.samples.tokens[:, 0]) != np.asarray(six.info.samples.tokens[:, 1])).any()
    for chunk in (1, 2):
        parts = decoding.best_of_n(base, reward, both, RNG, prompts, num_samples=6, chunk=chunk, **SHARED)
        np.testing.assert_array_equal(parts.info.samples.tokens, six.info.samples.tokens)
        np.testing.assert_array_equal(parts.completions.tokens, six.completions.tokens)
        np.testing.assert_allclose(parts.info.reward, six.info.reward, rtol=1e-5, atol=1e-6)


def test_a_prompt_alone_draws_what_it_draws_in_a_batch(prompts):
    lm, params = tiny_lm(0)
    reward_lm, reward_params = tiny_lm(1, "reward")
    base, reward = policies.language_model(lm), rewards.from_model(reward_lm)
    both = {"policy": params, "reward": reward_params}
    whole = decoding.best_of_n(base, reward, both, RNG, prompts, num_samples=3, **SHARED)
    last = TokenBatch(prompts.tokens[4:], prompts.mask[4:], jnp.array([4]))
    alone = decoding.best_of_n(base, reward, both, RNG, last, num_samples=3, **SHARED)
    np.testing.assert_array_equal(alone.info.samples.tokens[0], whole.info.samples.tokens[4])
    np.testing.assert_array_equal(padded([[1]]).tokens, [[1]])

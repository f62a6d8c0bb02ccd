"""GGRO on models: rows, one pass for reward and gain, traces and bad input."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, rewards
from jaxalign.types import TokenBatch
from tests.conftest import EOS, needs_jit, tiny_lm
from tests.ggro_toy import (
    INF,
    MARKOV,
    PROMPTS,
    RNG,
    WIDTH,
    B,
    T,
    V,
    _gradient,
    _reward,
    assert_completions_equal,
    guided,
    toy,
)


@pytest.fixture(scope="module")
def pair():
    (lm, params), (reward_lm, reward_params) = tiny_lm(0, num_layers=1), tiny_lm(1, "reward", num_layers=1)
    policy, reward, gain = policies.language_model(lm), rewards.from_model(reward_lm), rewards.token_gradient(reward_lm)

    def run(prompts, reward=reward, **options):
        given = {"policy": params, "reward": reward_params, "entropy_threshold": 1.2}
        options = {"num_samples": 4, "max_new_tokens": 9, "top_k": 6} | options
        return decoding.ggro(policy, reward, gain, given, RNG, prompts, eos_ids=EOS, **options)

    return run


def test_ggro_one_prompt_alone_is_that_prompt_in_a_batch(pair, prompts):
    together = pair(prompts, temperature=jnp.asarray(0.3))
    assert int(together.info.forced.sum()) > 0
    for b in (1, 3):
        one = TokenBatch(prompts.tokens[b : b + 1], prompts.mask[b : b + 1], jnp.array([b]))
        alone = pair(one, temperature=jnp.asarray(0.3))
        for name in ("tokens", "mask"):
            np.testing.assert_array_equal(
                getattr(alone.completions, name)[0], getattr(together.completions, name)[b], err_msg=name
            )
        for name in ("segment", "forced", "segments", "policy_steps", "reward_passes", "gradient_passes"):
            np.testing.assert_array_equal(getattr(alone.info, name)[0], getattr(together.info, name)[b], err_msg=name)
        np.testing.assert_allclose(alone.info.reward[0], together.info.reward[b], rtol=1e-4, atol=1e-5)


def test_ggro_reward_and_gain_in_one_pass_are_the_same(pair, prompts):
    apart, joint = pair(prompts), pair(prompts, reward=None)
    assert_completions_equal(apart.completions, joint.completions)
    np.testing.assert_allclose(apart.info.kept_reward, joint.info.kept_reward, rtol=1e-5, atol=1e-6)
    assert float((apart.info.reward - apart.info.greedy_reward[:, 0]).max()) > 0


@needs_jit
def test_ggro_values_do_not_retrace(prompts):
    traces = []

    def counting(params, rng, prompts, max_new_tokens):
        traces.append(1)
        return MARKOV.init(params, rng, prompts, max_new_tokens)

    policy = MARKOV._replace(init=counting)
    for candidates, threshold, temperature in ((1, 0.5, 0.0), (4, 1.0, 0.3), (9, INF, 0.0)):
        decoding.ggro(
            policy,
            _reward,
            _gradient,
            toy(0) | {"entropy_threshold": threshold},
            RNG,
            PROMPTS,
            num_samples=candidates,
            temperature=temperature,
            max_new_tokens=T,
            eos_ids=EOS,
        )
    assert traces == [1]


def test_ggro_a_threshold_per_prompt_is_that_prompts_own():
    params = toy(3)
    levels = jnp.where(jnp.arange(B) % 2 == 0, 0.0, INF)
    mixed, low, high = (guided(params, threshold=t) for t in (levels, 0.0, INF))
    for b in range(B):
        expected = low if b % 2 == 0 else high
        np.testing.assert_array_equal(mixed.completions.tokens[b], expected.completions.tokens[b])
        assert int(mixed.info.segments[b]) == int(expected.info.segments[b])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"candidates": 0}, "num_samples: expected at least 1"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"min_segment": 0}, "min_segment: expected at least 1"),
        ({"rule": "best"}, "rule: expected 'difference' or 'code'"),
        ({"temperature": -1.0}, "temperature: expected a value >= 0"),
        ({"threshold": math.nan}, "entropy_threshold: expected numbers, found NaN"),
        ({"threshold": jnp.zeros(3)}, "entropy_threshold: expected a scalar or shape"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"eos_ids": (V,)}, "eos_ids"),
    ],
)
def test_ggro_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        guided(toy(0), **options)


def test_ggro_another_vocabulary_nan_and_a_missing_reward_are_refused(pair, prompts):
    lm, params = tiny_lm(1, "reward", num_layers=1)
    gain = rewards.token_gradient(lm)
    options = {"num_samples": 2, "max_new_tokens": T, "eos_ids": EOS}
    given = toy(0) | {"gradient": params, "entropy_threshold": 1.0}
    with pytest.raises(ValueError, match="vocabulary of 6 tokens, found 11"):
        decoding.ggro(MARKOV, _reward, gain, given, RNG, PROMPTS, **options)
    with pytest.raises(ValueError, match="reward: expected a Reward beside a gradient"):
        decoding.ggro(MARKOV, None, _gradient, toy(0) | {"entropy_threshold": 1.0}, RNG, PROMPTS, **options)
    with pytest.raises(ValueError, match="scalar head"):
        rewards.token_gradient(tiny_lm(0, num_layers=1)[0])
    bad = toy(0)
    bad["reward"]["v"] = jnp.full(WIDTH, jnp.nan)
    with pytest.raises(ValueError, match="found NaN for prompts"):
        guided(bad)

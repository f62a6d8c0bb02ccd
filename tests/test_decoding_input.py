"""Bad input of the decoders is a ValueError before anything is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxalign import critics, decoding, policies
from jaxalign.types import TokenBatch
from tests.conftest import EOS, PROMPTS, padded, tiny_lm

RNG = jax.random.key(0)


def refuse(match, **changes):
    """sample must raise a ValueError before it traces anything."""
    lm, base = tiny_lm(0)
    reward_lm, reward = tiny_lm(1, "reward")
    policy = policies.tilt(policies.language_model(lm), critics.args(reward_lm), top_k=3)

    def init(*arguments):
        raise AssertionError("traced")

    call = {
        "params": {"policy": base, "critic": reward, "beta": 1.0},
        "prompts": padded(PROMPTS),
        "max_new_tokens": 3,
        "eos_ids": EOS,
        "temperature": 1.0,
    } | changes
    params, prompts = call.pop("params"), call.pop("prompts")
    with pytest.raises(ValueError, match=match):
        decoding.sample(policy._replace(init=init), params, RNG, prompts, **call)


def test_bad_input_is_a_value_error_before_tracing():
    _lm, base = tiny_lm(0)
    reward = tiny_lm(1, "reward")[1]
    for beta in (0.0, -1.0, jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])):
        refuse("beta: expected a value > 0", params={"policy": base, "critic": reward, "beta": beta})
    refuse("max_new_tokens: expected at least 1, found 0", max_new_tokens=0)
    refuse("context of 64, found a prompt of 4 tokens", max_new_tokens=61)
    refuse("temperature: expected a value >= 0", temperature=-0.1)
    refuse(r"eos_ids: expected ids in \[0, 11\)", eos_ids=(11,))
    prompts = padded(PROMPTS)
    refuse(r"none in rows \[2\]", prompts=prompts._replace(mask=prompts.mask.at[2].set(False)))
    refuse(r"token ids in \[0, 11\)", prompts=prompts._replace(tokens=prompts.tokens.at[0, -1].set(11)))
    refuse("found shape", prompts=TokenBatch(jnp.zeros((0, 3), jnp.int32), jnp.zeros((0, 3), bool)))
    refuse("one shape", prompts=prompts._replace(mask=prompts.mask[:, 1:]))
    refuse("'policy'", prompts={"critic": prompts})


def test_bad_compositions_are_refused_when_built():
    lm, base = tiny_lm(0)
    wide, wide_params = tiny_lm(0, vocab_size=13)
    policy, reward = policies.language_model(lm), critics.args(tiny_lm(1, "reward")[0])
    arm = critics.genarm(lm)
    with pytest.raises(ValueError, match="top_k: expected at most the vocabulary's 11 tokens, found 12"):
        policies.tilt(policy, reward, top_k=12)
    with pytest.raises(ValueError, match="top_k"):
        policies.tilt(policy, reward, top_k=0)
    with pytest.raises(ValueError, match="k: expected 1 to"):
        policies.top_k(policy, 12)
    with pytest.raises(ValueError, match="one vocabulary, found 11 and 13"):
        policies.tilt(policy, critics.genarm(wide))
    with pytest.raises(ValueError, match="one vocabulary"):
        policies.with_reference(policy, policies.language_model(wide))
    with pytest.raises(ValueError, match=r"one kind, found \['increment', 'level'\]"):
        critics.weighted_sum([reward, arm])
    with pytest.raises(ValueError, match="scalar head"):
        critics.args(lm)
    critic = critics.weighted_sum([arm, arm])
    tilted = policies.tilt(policy, critic)
    params = {"policy": base, "critic": {"critics": [base, base], "weights": jnp.ones(3)}, "beta": 1.0}
    with pytest.raises(ValueError, match=r"weights: expected shape \(2,\) or \(5, 2\)"):
        decoding.sample(tilted, params, RNG, padded(PROMPTS), max_new_tokens=2, eos_ids=EOS)
    del wide_params


def test_bad_arguments_of_the_other_decoders():
    lm, params = tiny_lm(0)
    policy = policies.language_model(lm)
    with pytest.raises(ValueError, match="num_samples: expected at least 1"):
        decoding.best_of_n(
            policy,
            None,
            {"policy": params, "reward": None},
            RNG,
            padded(PROMPTS),
            num_samples=0,
            max_new_tokens=2,
            eos_ids=EOS,
        )
    mask = jnp.array([[True, False, True]] * 5)
    with pytest.raises(ValueError, match="right-padded"):
        decoding.log_prob(policy, params, RNG, padded(PROMPTS), jnp.ones((5, 3), jnp.int32), mask)
    for value, name in ((1.5, "top_p"), (0.0, "top_p")):
        nucleus = policies.top_p(policy)
        with pytest.raises(ValueError, match=name):
            decoding.sample(
                nucleus, {"policy": params, "top_p": value}, RNG, padded(PROMPTS), max_new_tokens=2, eos_ids=EOS
            )

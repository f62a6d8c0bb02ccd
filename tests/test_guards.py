"""What stands where a Policy, a Critic, a function, params or numbers per prompt are expected is checked."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, rewards, tree
from jaxalign._checks import ParamsError, fields_of
from jaxalign.types import Critic
from tests import cases
from tests.conftest import EOS, PROMPTS, padded

RNG = jax.random.key(0)
TREE = cases.TREE
TABLE, OTHER = cases.table(0), cases.table(5)
BASE = tree.policy(TREE)
LEVEL = tree.critic(TREE, "level")
LM, LM_PARAMS = cases.tiny_lm(0)


def start(policy, params, prompts=None):
    prompts = padded(PROMPTS) if prompts is None else prompts
    return jax.jit(policy.init, static_argnums=3)(params, RNG, prompts, 3)


def sample(policy, params):
    return decoding.sample(policy, params, RNG, padded(PROMPTS), max_new_tokens=2, eos_ids=EOS)


def half(map_params, q, log_prob, index):
    return q / 2


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: policies.tilt(LEVEL, BASE), "policy: expected a Policy, found a Critic"),
        (lambda: policies.tilt(BASE, BASE), "critic: expected a Critic, found a Policy"),
        (lambda: policies.tilt(LM, LEVEL), "policy: expected a Policy, found .*policies.language_model makes one"),
        (lambda: policies.tilt("gpt2", LEVEL), "policy: expected a Policy, found 'gpt2'"),
        (lambda: policies.tilt(BASE, LEVEL, top_k=2.0), "top_k: expected an integer, found 2.0"),
        (lambda: policies.tilt(BASE, LEVEL, top_k=True), "top_k: expected an integer, found True"),
        (lambda: policies.top_k(BASE, 2.5), "k: expected an integer, found 2.5"),
        (lambda: policies.top_k(LEVEL, 2), "policy: expected a Policy, found a Critic"),
        (lambda: policies.top_p(LEVEL), "policy: expected a Policy, found a Critic"),
        (lambda: policies.temperature(LEVEL), "policy: expected a Policy, found a Critic"),
        (lambda: policies.with_reference(BASE, LEVEL), "reference: expected a Policy, found a Critic"),
        (lambda: policies.re_control(BASE, LM, policies.linear_value, num_steps=1), "unembed: expected a function"),
        (lambda: policies.re_control(BASE, LM.logits, LEVEL, num_steps=1), "value: expected a function, found Critic"),
        (
            lambda: policies.re_control(BASE, LM.logits, policies.linear_value, num_steps=1.5),
            "steps: expected an integer",
        ),
        (lambda: policies.re_control_expected(BASE, LM.logits, BASE, num_steps=1), "critic: expected a Critic"),
        (lambda: policies.language_model(BASE), "language_model: expected a language model, found Policy"),
        (lambda: policies.language_model("gpt2"), "language_model: expected a language model, found gpt2"),
        (lambda: policies.language_model(LM.config), "language_model: expected a model with .*, found none of prefill"),
        (lambda: critics.genarm(object()), "genarm: expected a model with .*, found none of vocab_size, max_length"),
        (lambda: critics.args(BASE), "args: expected a language model, found Policy"),
        (lambda: rewards.from_model(BASE), "from_model: expected a language model, found Policy"),
        (lambda: rewards.from_model(object()), "from_model: expected a model with .*, found none of .*head_width"),
        (lambda: rewards.token_gradient("gpt2"), "token_gradient: expected a language model, found gpt2"),
        (lambda: critics.weighted_sum(LEVEL), "critics: expected a sequence of critics, found one Critic"),
        (lambda: critics.weighted_sum([LEVEL, BASE]), r"critics\[1\]: expected a Critic, found a Policy"),
        (lambda: critics.map_scores(BASE, max), "critic: expected a Critic, found a Policy"),
        (lambda: critics.map_scores(LEVEL, 2.0), "f: expected a function, found 2.0"),
        (lambda: critics.shaped_over_candidates(BASE, beta=1.0), "critic: expected a Critic, found a Policy"),
        (lambda: critics.hidden_value(LM), "head: expected a function"),
        (lambda: critics.transfer_q(LEVEL, tree.reward(TREE), num_samples=1), "baseline: expected a Policy"),
        (lambda: critics.transfer_q(BASE, "reward", num_samples=1), "reward: expected a Reward, found 'reward'"),
        (lambda: critics.transfer_q(BASE, tree.reward(TREE), num_samples=1.5), "num_samples: expected an integer"),
        (lambda: Critic(LEVEL.init, LEVEL.score, LEVEL.advance, "levels"), "kind: expected 'level' or 'increment'"),
        (lambda: LEVEL._replace(kind="sum"), "kind: expected 'level' or 'increment', found 'sum'"),
    ],
)
def test_an_argument_of_another_kind_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# Params ---------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: object
    right: object = None


def test_params_are_a_named_tuple_or_a_dict_of_the_same_names():
    assert fields_of({"left": 1}, Pair) == fields_of(Pair(1), Pair) == Pair(1)
    for params, match in (
        ({"right": 1}, r"params: expected entries left, right \(optional\); found right \(missing left\)"),
        ({"left": 1, "rihgt": 2}, r"found left, rihgt \(unknown rihgt\)"),
        ({}, r"found none \(missing left\)"),
        (jnp.zeros(3), "found ArrayImpl"),
        ((1, 2), "found tuple"),
    ):
        with pytest.raises(ParamsError, match=match):
            fields_of(params, Pair)
    with pytest.raises(ParamsError, match="missing right"):
        fields_of({"left": 1}, Pair, required=("right",))


def test_wrong_params_are_named_with_their_path():
    inner = policies.tilt(BASE, LEVEL)
    outer = policies.tilt(policies.temperature(inner), critics.weighted_sum([LEVEL, critics.map_scores(LEVEL, half)]))
    good = {
        "policy": {"policy": {"policy": TABLE, "critic": OTHER, "beta": 1.0}, "temperature": 1.0},
        "critic": {"critics": [OTHER, {"critic": OTHER, "map": None}], "weights": jnp.ones(2)},
        "beta": 1.0,
    }
    sample(outer, good)
    deep = {"policy": TABLE, "critics": OTHER, "beta": 1.0}
    for params, match in (
        (
            good | {"policy": {"policy": deep, "temperature": 1.0}},
            r"params\['policy'\]\['policy'\]: expected entries policy, critic, beta; found policy, critics, beta "
            r"\(missing critic; unknown critics\)",
        ),
        (
            good | {"critic": {"critics": [OTHER, {"critic": OTHER}], "weights": jnp.ones(2)}},
            r"params\['critic'\]\['critics'\]\[1\]: expected entries critic, map; found critic \(missing map\)",
        ),
        (
            good | {"critic": {"critics": [OTHER], "weights": jnp.ones(2)}},
            r"params\['critic'\]\['critics'\]: expected parameters of 2 critics, found 1",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            sample(outer, params)


def test_named_tuples_and_dicts_give_the_same_numbers_and_gradients():
    policy = policies.tilt(policies.temperature(BASE), critics.weighted_sum([LEVEL, LEVEL]))
    weights, beta, heat = jnp.array([0.5, 0.2]), jnp.asarray(0.7), jnp.asarray(0.9)
    named = policies.TiltParams(
        policies.TemperatureParams(TABLE, heat), critics.WeightedSumParams([OTHER, OTHER], weights), beta
    )
    plain = {
        "policy": {"policy": TABLE, "temperature": heat},
        "critic": {"critics": [OTHER, OTHER], "weights": weights},
        "beta": beta,
    }
    tokens, mask = jnp.ones((5, 2), jnp.int32), jnp.ones((5, 2), bool)

    def total(params):
        return decoding.log_prob(policy, params, RNG, padded(PROMPTS), tokens, mask).log_prob.sum()

    (one, by_name), (two, by_key) = jax.value_and_grad(total)(named), jax.value_and_grad(total)(plain)
    assert isinstance(by_name, policies.TiltParams)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(by_name.critic.weights, by_key["critic"]["weights"])
    np.testing.assert_array_equal(by_name.policy.policy, by_key["policy"]["policy"])


def test_prompts_may_be_the_named_tuple_of_the_params():
    policy, prompts = policies.tilt(BASE, LEVEL), padded(PROMPTS)
    params = policies.TiltParams(TABLE, OTHER, 1.0)
    mirrored = policies.TiltParams(prompts, prompts, None)
    one, two = (
        decoding.sample(policy, params, RNG, given, max_new_tokens=2, eos_ids=EOS) for given in (prompts, mirrored)
    )
    np.testing.assert_array_equal(one.tokens, two.tokens)


# Numbers and tables per prompt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "params", "match"),
    [
        (policies.tilt(BASE, LEVEL), {"critic": OTHER, "beta": jnp.ones(4)}, "beta"),
        (policies.tilt(BASE, LEVEL), {"critic": OTHER, "beta": jnp.ones((5, 1))}, "beta"),
        (policies.temperature(BASE), {"temperature": jnp.ones((1, 5))}, "temperature"),
        (policies.top_p(BASE), {"top_p": jnp.ones(6)}, "top_p"),
        (
            policies.tilt(BASE, critics.shaped_over_candidates(LEVEL, beta=1.0)),
            {"critic": {"critic": OTHER, "bound": jnp.ones(4)}, "beta": 1.0},
            "bound",
        ),
    ],
)
def test_numbers_per_prompt_of_another_shape_are_named(policy, params, match):
    for call in (sample, start):
        with pytest.raises(ValueError, match=rf"{match}: expected a scalar or shape \(5,\), one per prompt"):
            call(policy, {"policy": TABLE} | params)


def test_a_bound_is_one_per_prompt_under_repeated_rows():
    """Each prompt keeps its own bound when a decoder repeats its rows."""
    critic = critics.shaped_over_candidates(LEVEL, beta=1.0)
    policy, bound = policies.tilt(BASE, critic), jnp.linspace(0.5, 2.0, 5)
    params = policies.TiltParams(TABLE, critics.ShapedParams(OTHER, bound), 1.0)
    state, output = start(policy, params)
    doubled = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), state)
    token = jnp.arange(5, dtype=jnp.int32)
    expected = policy.step(params, RNG, state, token)[1].log_prob
    found = policy.step(params, RNG, doubled, jnp.repeat(token, 2))[1].log_prob
    np.testing.assert_allclose(found[::2], expected, rtol=1e-6)
    for bad in (0.0, jnp.array([1, 1, -1, 1, 1])):
        with pytest.raises(ValueError, match="bound: expected a value > 0"):
            sample(policy, params._replace(critic=critics.ShapedParams(OTHER, bad)))
    del output


def by_prompt(map_params, q, log_prob, index):
    return q * critics.look_up(map_params, index)[:, None]


def test_a_table_that_is_too_short_is_named_or_nan():
    table = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(critics.look_up(table, jnp.array([2, 0])), [3, 1])
    np.testing.assert_array_equal(critics.look_up(jnp.arange(6).reshape(3, 2), jnp.array([1])), [[2, 3]])
    for index in ([0, 3], [-1]):
        with pytest.raises(ValueError, match=r"table: expected a table with a row for each prompt's index, .*3 rows"):
            critics.look_up(table, jnp.array(index))
        assert np.isnan(jax.jit(critics.look_up)(table, jnp.array(index))[-1])
    with pytest.raises(ValueError, match="table: expected a table with a row for each prompt's index, found a scalar"):
        critics.look_up(1.0, jnp.array([0]))


def test_a_table_of_a_map_that_is_too_short_gives_nan_and_not_another_prompts_row():
    policy = policies.tilt(BASE, critics.map_scores(LEVEL, by_prompt))
    params = {"policy": TABLE, "critic": {"critic": OTHER, "map": jnp.ones(4)}, "beta": 1.0}
    log_prob = start(policy, params)[1].log_prob
    assert np.isfinite(log_prob[:4]).all()
    assert np.isnan(log_prob[4]).all()

"""What stands where a Policy, a Critic or a function is expected, and what it returns, is checked."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, tree
from jaxalign._checks import ParamsError, fields_of
from jaxalign.types import Critic
from tests import cases
from tests.conftest import EOS, PROMPTS, VOCAB, padded

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
        (lambda: critics.weighted_sum(LEVEL), "critics: expected a sequence of critics, found one Critic"),
        (lambda: critics.weighted_sum([LEVEL, BASE]), r"critics\[1\]: expected a Critic, found a Policy"),
        (lambda: critics.map_scores(BASE, max), "critic: expected a Critic, found a Policy"),
        (lambda: critics.map_scores(LEVEL, 2.0), "f: expected a function, found 2.0"),
        (lambda: critics.shaped_over_candidates(BASE, beta=1.0), "critic: expected a Critic, found a Policy"),
        (lambda: critics.hidden_value(LM), "head: expected a function"),
        (lambda: critics.transfer_q(LEVEL, tree.reward(TREE), num_samples=1), "baseline: expected a Policy"),
        (lambda: critics.transfer_q(BASE, "reward", num_samples=1), "reward: expected a function, found 'reward'"),
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


# What functions of one's own return -----------------------------------------------------------------------------------


def half(map_params, q, log_prob, index):
    return q / 2


def own_critic(**changes):
    """A tabular critic with other functions in place of its own."""
    return LEVEL._replace(**changes)


def scored(change):
    def my_score(params, rng, state, output, candidates):
        return change(*LEVEL.score(params, rng, state, output, candidates))

    return own_critic(score=my_score)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda q, p: (q[..., None], p),
            r"q: expected shape \(5, 3\), one score per row and candidate, found \(5, 3, 1\)",
        ),
        (lambda q, p: (q[:, 0], p), r"q: expected shape \(5, 3\).*found \(5,\)"),
        (lambda q, p: (q[:1], p), r"q: expected shape \(5, 3\).*found \(1, 3\)"),
        (lambda q, p: (q.astype(int), p), "q: expected floating-point numbers.*found int32"),
        (lambda q, p: q, r"expected a pair \(q, proposal\), found a"),
        (
            lambda q, p: (q, {"state": p, "t": jnp.zeros(())}),
            r"batch axis \(5\) first, found shape \(\) at \['t'\]",
        ),
    ],
)
def test_the_scores_of_a_critic_are_checked(change, match):
    critic = scored(change)
    for build, params in (
        (lambda c: policies.tilt(BASE, c, top_k=3), {"policy": TABLE, "critic": OTHER, "beta": 1.0}),
        (
            lambda c: policies.tilt(BASE, critics.map_scores(c, half), top_k=3),
            {"policy": TABLE, "critic": {"critic": OTHER, "map": None}, "beta": 1.0},
        ),
        (
            lambda c: policies.tilt(BASE, critics.weighted_sum([c]), top_k=3),
            {"policy": TABLE, "critic": {"critics": [OTHER], "weights": jnp.ones(1)}, "beta": 1.0},
        ),
        (
            lambda c: policies.tilt(BASE, critics.shaped_over_candidates(c, beta=1.0), top_k=3),
            {"policy": TABLE, "critic": {"critic": OTHER, "bound": 1.0}, "beta": 1.0},
        ),
    ):
        with pytest.raises(ValueError, match=r"critic.score \(.*my_score\)" + ".*" + match):
            start(build(critic), params)


def fed(change):
    """A tabular policy whose init gives another output."""

    def my_init(params, rng, prompts, max_new_tokens):
        return change(*BASE.init(params, rng, prompts, max_new_tokens))

    return BASE._replace(init=my_init)


def stepped(change):
    def my_step(params, rng, state, token):
        return change(*BASE.step(params, rng, state, token))

    return BASE._replace(step=my_step)


OUTPUTS = [
    (lambda s, o: (s, o._replace(log_prob=o.log_prob[0])), r"expected log_prob of shape \(.*, V\), found \(11,\)"),
    (lambda s, o: (s, o._replace(log_prob=o.log_prob[:, None])), r"expected log_prob of shape \(.*, V\)"),
    (
        lambda s, o: (s, o._replace(log_norm=o.log_norm[:, None])),
        r"log_norm: expected shape \(5,\), one number per row",
    ),
    (lambda s, o: (s, o._replace(log_prob_ref=o.log_prob_ref[:, :2])), r"log_prob_ref: expected shape \(5, 11\)"),
    (lambda s, o: (s, o._replace(hidden=jnp.zeros(5))), r"expected hidden of shape \(5, D\) or None, found \(5,\)"),
    (lambda s, o: (s, o.log_prob), r"expected \(state, StepOutput\)"),
    (lambda s, o: o, r"expected a pair \(state, StepOutput\)"),
]


@pytest.mark.parametrize(("change", "match"), OUTPUTS)
def test_the_outputs_of_a_policy_are_checked(change, match):
    for policy, name in ((fed(change), r"policy.init \(.*my_init\)"), (stepped(change), r"policy.step \(.*my_step\)")):
        for build, params in (
            (lambda p: policies.tilt(p, LEVEL), {"policy": TABLE, "critic": OTHER, "beta": 1.0}),
            (policies.temperature, {"policy": TABLE, "temperature": 1.0}),
            (lambda p: policies.top_k(p, 2), TABLE),
            (lambda p: policies.with_reference(p, BASE), {"policy": TABLE, "reference": TABLE}),
        ):
            with pytest.raises(ValueError, match=name + ".*" + match):
                sample(build(policy), params)


def test_a_state_without_the_batch_first_is_named():
    policy = fed(lambda s, o: ((s, {"count": jnp.zeros(2)}), o))
    with pytest.raises(ValueError, match=r"policy.init .*\(5\) first, found shape \(2,\) at \[1\]\['count'\]"):
        start(policies.temperature(policy), {"policy": TABLE, "temperature": 1.0})


def summed(map_params, q, log_prob, index):
    return q.sum(axis=-1)


def counted(map_params, q, log_prob, index):
    return (q > 0).astype(jnp.int32)


@pytest.mark.parametrize(
    ("f", "match"),
    [
        (summed, r"map_scores: f \(summed\): expected shape \(5, 11\).*found \(5,\)"),
        (counted, r"map_scores: f \(counted\): expected floating-point numbers"),
    ],
)
def test_the_map_of_scores_gives_a_score_per_candidate(f, match):
    policy = policies.tilt(BASE, critics.map_scores(LEVEL, f))
    with pytest.raises(ValueError, match=match):
        start(policy, {"policy": TABLE, "critic": {"critic": OTHER, "map": None}, "beta": 1.0})


def my_head(params, hidden):
    return hidden[:, :1]


def my_unembed(params, hidden):
    return hidden


def test_heads_and_unembeddings_are_checked():
    base = policies.language_model(LM)
    with pytest.raises(ValueError, match=r"hidden_value: head \(my_head\): expected shape \(5, 11\).*found \(5, 1\)"):
        start(policies.tilt(base, critics.hidden_value(my_head)), {"policy": LM_PARAMS, "critic": None, "beta": 1.0})
    params = {"policy": LM_PARAMS, "value": jnp.ones(16), "step_size": 0.1}
    with pytest.raises(ValueError, match=r"unembed \(my_unembed\): expected shape \(5, 11\).*found \(5, 16\)"):
        start(policies.re_control(base, my_unembed, policies.linear_value, num_steps=1), params)
    with pytest.raises(ValueError, match=r"value \(my_unembed\): expected shape \(5,\), one number per row"):
        start(policies.re_control(base, LM.logits, my_unembed, num_steps=1), params)


def columns(params, tokens, mask, prompt_length, index):
    return params[tokens].sum(axis=1, keepdims=True)


def test_transfer_q_refuses_a_reward_that_is_not_one_number_per_text():
    policy = policies.tilt(BASE, critics.transfer_q(BASE, columns, num_samples=2, lookahead=1))
    with pytest.raises(ValueError, match="columns"):
        start(policy, {"policy": TABLE, "critic": {"baseline": TABLE, "reward": TABLE[0]}, "beta": 1.0})


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


# Tables per prompt ----------------------------------------------------------------------------------------------------


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


# A model of one's own -------------------------------------------------------------------------------------------------


class Bigrams:
    """The next token depends on the last one alone: what `types.LanguageModel` asks, and no more."""

    vocab_size, max_length, eos_ids = VOCAB, 32, EOS

    def prefill(self, params, tokens, mask, capacity):
        last = jnp.max(jnp.where(mask, jnp.arange(tokens.shape[1]), -1), axis=1)
        token = jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0]
        return jax.nn.one_hot(token, VOCAB), token

    def step(self, params, cache, token):
        token = jnp.where(token < 0, cache, token)
        return jax.nn.one_hot(token, VOCAB), token

    def logits(self, params, hidden):
        return hidden @ params


def test_a_model_of_ones_own_is_a_policy():
    lm, table = Bigrams(), jax.random.normal(RNG, (VOCAB, VOCAB))
    policy = policies.language_model(lm)
    assert policy.log_prob is None
    assert policy.eos_ids == EOS
    drawn = decoding.sample(policy, table, RNG, padded(PROMPTS), max_new_tokens=4, eos_ids=EOS)
    given = decoding.log_prob(policy, table, RNG, padded(PROMPTS), drawn.tokens, drawn.mask, eos_ids=EOS)
    before = np.stack([[row[-1], *tokens[:-1]] for row, tokens in zip(PROMPTS, drawn.tokens, strict=True)])
    expected = np.asarray(jax.nn.log_softmax(table))[before, np.asarray(drawn.tokens)]
    np.testing.assert_allclose(given.log_prob, np.where(drawn.mask, expected, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(given.log_prob, drawn.log_prob, rtol=1e-5, atol=1e-6)


def test_a_model_of_ones_own_guides_and_is_guided():
    lm, table = Bigrams(), jax.random.normal(RNG, (VOCAB, VOCAB))
    policy = policies.tilt(policies.language_model(lm), critics.genarm(lm), top_k=4)
    params = policies.TiltParams(table, table, 2.0)
    drawn = decoding.sample(policy, params, RNG, padded(PROMPTS), max_new_tokens=3, eos_ids=EOS, temperature=0.5)
    assert bool(jnp.isfinite(drawn.log_prob).all())
    mixed = policies.tilt(policies.language_model(lm), critics.args(cases.tiny_lm(1, "reward")[0]))
    params = policies.TiltParams(table, cases.tiny_lm(1, "reward")[1], 1.0)
    assert bool(jnp.isfinite(sample(mixed, params).log_prob).all())


def test_the_logits_of_a_model_of_ones_own_are_checked():
    class Narrow(Bigrams):
        def logits(self, params, hidden):
            return hidden[:, :3]

    class Wide(Bigrams):
        def prefill(self, params, tokens, mask, capacity):
            return jnp.zeros((*tokens.shape, 4)), tokens[:, 0]

    with pytest.raises(ValueError, match=r"language_model: lm.logits: expected shape \(5, 11\).*found \(5, 3\)"):
        start(policies.language_model(Narrow()), None)
    with pytest.raises(ValueError, match=r"language_model: expected hidden states \[B,D\]"):
        start(policies.language_model(Wide()), None)
    with pytest.raises(ValueError, match="expected prompt and new tokens within the model's context of 32"):
        decoding.sample(
            policies.language_model(Bigrams()), jnp.ones((11, 11)), RNG, padded(PROMPTS), max_new_tokens=32, eos_ids=EOS
        )

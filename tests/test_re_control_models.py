"""RE-Control on language models: rows, caches, gradients, precision and bad input."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, gibbs, policies, tree
from jaxalign.training import objectives
from jaxalign.types import TokenBatch
from tests.conftest import PROMPTS, padded, tiny_lm
from tests.test_re_control import RAGGED, unembed

RNG = jax.random.key(0)
LM, LM_PARAMS = tiny_lm(0, num_layers=1)
VALUE_LM, VALUE_PARAMS = tiny_lm(2, "value", num_layers=1)
HEAD = policies.head_value(VALUE_LM)
BASE = policies.language_model(LM)
EDIT = policies.re_control(BASE, LM.logits, HEAD, num_steps=4)
VALUES = jax.jit(lambda params, tokens, mask: VALUE_LM.head(params, VALUE_LM.hidden(params, tokens, mask=mask))[..., 0])
LM_GIVEN = {"policy": LM_PARAMS, "value": VALUE_PARAMS, "step_size": jnp.asarray(0.3)}


@functools.partial(jax.jit, static_argnums=0)
def walk(policy, params, batch, tokens):
    """Final state, and outputs along tokens [B,T]."""
    state, output = policy.init(params, RNG, batch, tokens.shape[1])
    outputs = [output]
    for t in range(tokens.shape[1]):
        state, output = policy.step(params, RNG, state, tokens[:, t])
        outputs.append(output)
    return state, outputs


TOKENS = jnp.array([[1, 2], [3, 3], [10, 4], [2, 8], [7, 1]])


@pytest.fixture(scope="module")
def base_walk():
    return walk(BASE, LM_PARAMS, padded(PROMPTS), TOKENS)


@pytest.mark.parametrize("no", ["steps", "step_size"])
def test_re_control_R1_no_steps_or_no_step_size_is_the_base_bit_for_bit(no, base_walk):
    policy = policies.re_control(BASE, LM.logits, HEAD, num_steps=0) if no == "steps" else EDIT
    params = LM_GIVEN | ({"step_size": jnp.asarray(0.0)} if no == "step_size" else {})
    _, outputs = walk(policy, params, padded(PROMPTS), TOKENS)
    chex.assert_trees_all_equal(outputs, base_walk[1])
    _, moved = walk(EDIT, LM_GIVEN, padded(PROMPTS), TOKENS)
    assert float(jnp.abs(moved[0].log_prob - outputs[0].log_prob).max()) > 1e-2


def test_re_control_R5_caches_and_states_are_the_bases_on_equal_tokens(base_walk):
    state, outputs = walk(EDIT, LM_GIVEN, padded(PROMPTS), TOKENS)
    chex.assert_trees_all_equal(state.policy, base_walk[0])
    for found, expected in zip(outputs, base_walk[1], strict=True):
        np.testing.assert_array_equal(found.hidden, expected.hidden)
        np.testing.assert_array_equal(found.log_prob_ref, expected.log_prob)


@pytest.mark.parametrize("objective", ["td", "fudge"])
def test_re_control_R7_the_objective_reads_the_states_that_draw_and_pays_the_last_of_them(objective):
    """By hand, on ragged rows: values at the positions before each response token; one row without a response."""
    tokens = jnp.array([[4, 5, 1, 2, 7, 0], [7, 3, 2, 0, 0, 0], [1, 2, 3, 0, 0, 0]])
    mask = jnp.arange(6) < jnp.array([[6], [4], [3]])
    loss_mask = mask & (jnp.arange(6) >= jnp.array([[2], [1], [3]]))
    reward = jnp.array([0.7, -1.2, 9.0])
    batch = {"tokens": tokens, "mask": mask, "loss_mask": loss_mask, "reward": reward}
    measured, aux = jax.jit(objectives.value(VALUE_LM, objective, before=True))(VALUE_PARAMS, batch, None)
    v = np.asarray(VALUES(VALUE_PARAMS, tokens, mask))
    # Row 0: prompt 2 tokens, response 4: states 1..4; row 1: prompt 1, response 3: states 0..2.
    total = 0.0
    for row, states in ((0, [1, 2, 3, 4]), (1, [0, 1, 2])):
        values = v[row, states]
        target = np.append(values[1:], reward[row]) if objective == "td" else np.full(len(states), reward[row])
        total += 0.5 * ((values - target) ** 2).sum()
    np.testing.assert_allclose(measured, total / 2, rtol=1e-5)
    np.testing.assert_allclose(
        aux.metrics["squared_error"], ((v[0, 4] - 0.7) ** 2 + (v[1, 2] + 1.2) ** 2) / 2, rtol=1e-4
    )
    with pytest.raises(ValueError, match="before: expected a scalar head"):
        objectives.value(tiny_lm(3, "q", num_layers=1)[0], "td", before=True)


def test_re_control_R8_rows_are_independent():
    """A batch is its rows one by one, under any padding, each with its own step size."""
    sizes = jnp.array([0.0, 0.1, 0.3, 0.5, 1.0])
    params = LM_GIVEN | {"step_size": sizes}
    _, together = walk(EDIT, params, padded(PROMPTS), TOKENS)
    for b in range(5):
        one = padded([PROMPTS[b]] * 5, side="right", extra=1)
        _, alone = walk(EDIT, params | {"step_size": jnp.full(5, sizes[b])}, one, jnp.tile(TOKENS[b], (5, 1)))
        for t in range(3):
            np.testing.assert_allclose(alone[t].log_prob[0], together[t].log_prob[b], rtol=1e-5, atol=1e-5)
    # A row whose value is NaN spoils no other row.
    nan = jnp.where(jnp.arange(5) == 2, jnp.nan, 1)
    spoilt = policies.re_control(BASE, LM.logits, lambda p, h: HEAD(p, h) * nan, num_steps=4)
    _, found = walk(spoilt, params, padded(PROMPTS), TOKENS)
    rows = np.array([0, 1, 3, 4])
    np.testing.assert_allclose(found[1].log_prob[rows], together[1].log_prob[rows], rtol=1e-6, atol=1e-6)
    assert bool(jnp.isnan(found[1].log_prob[2]).all())


def test_re_control_expected_q_of_a_q_head_on_the_policys_hidden_states():
    q_lm, q_params = tiny_lm(3, "q", num_layers=1)
    critic = critics.hidden_value(q_lm.head, vocab_size=q_lm.vocab_size)
    policy = policies.re_control_expected(BASE, LM.logits, critic, num_steps=3)
    given = {"policy": LM_PARAMS, "critic": q_params, "step_size": jnp.asarray(0.02)}
    _, outputs = walk(policy, given, padded(PROMPTS), TOKENS)
    for output in outputs:
        q = q_lm.head(q_params, output.hidden)
        gained = gibbs.utility(output.log_prob, q) - gibbs.utility(output.log_prob_ref, q)
        assert bool((gained > 0).all())


def test_re_control_gradients_reach_the_step_size_and_the_value():
    batch, mask = padded(PROMPTS), jnp.ones(TOKENS.shape, bool)

    def score(given):
        return decoding.log_prob(EDIT, given, RNG, batch, TOKENS, mask).log_prob.sum()

    gradient_of = jax.jit(jax.grad(score))
    gradient = gradient_of(LM_GIVEN)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
    up, down = (score(LM_GIVEN | {"step_size": jnp.asarray(0.3 + e)}) for e in (1e-2, -1e-2))
    np.testing.assert_allclose(gradient["step_size"], (up - down) / 2e-2, rtol=2e-2)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient["value"]["head"])) > 1e-3
    at_zero = gradient_of(LM_GIVEN | {"step_size": jnp.asarray(0.0)})["step_size"]
    assert abs(float(at_zero)) > 1e-3  # though the policy there is the base's


def test_re_control_over_a_tilt_reads_the_models_parameters_inside():
    arm, arm_params = tiny_lm(4, num_layers=1)
    tilted = policies.tilt(BASE, critics.genarm(arm))
    policy = policies.re_control(tilted, lambda p, h: LM.logits(p["policy"], h), HEAD, num_steps=4)
    inner = {"policy": LM_PARAMS, "critic": arm_params, "beta": jnp.asarray(1.0)}
    above = walk(policy, LM_GIVEN | {"policy": inner}, padded(PROMPTS), TOKENS)[1]
    below = walk(tilted, inner, padded(PROMPTS), TOKENS)[1]
    alone = walk(EDIT, LM_GIVEN, padded(PROMPTS), TOKENS)[1]
    for t in range(3):
        added = alone[t].log_prob - alone[t].log_prob_ref
        expected = jax.nn.log_softmax(below[t].log_prob + added)
        np.testing.assert_allclose(above[t].log_prob, expected, rtol=1e-4, atol=1e-5)


def test_re_control_small_steps_count_in_bfloat16():
    """Hidden states of 8 bits: a step of 1e-4 of them is kept in float32, and so is V."""
    lm, params = tiny_lm(0, dtype="bfloat16", num_layers=1)
    value_lm, value_params = tiny_lm(2, "value", dtype="bfloat16", num_layers=1)
    policy = policies.re_control(policies.language_model(lm), lm.logits, policies.head_value(value_lm), num_steps=4)
    given = {"policy": params, "value": value_params}
    output = [
        walk(policy, given | {"step_size": jnp.asarray(size)}, padded(PROMPTS), TOKENS[:, :1])[1][0]
        for size in (0.0, 1e-4, 2e-4)
    ]
    moved = [np.asarray(o.log_prob - output[0].log_prob) for o in output[1:]]
    assert output[1].log_prob.dtype == jnp.float32
    assert np.abs(moved[0]).max() > 1e-5
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=0.05, atol=2e-5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: policies.re_control(BASE, LM.logits, HEAD, num_steps=-1), "num_steps: expected at least 0"),
        (
            lambda: policies.re_control(BASE, LM.logits, HEAD, num_steps=1, max_norm=0.0),
            "max_norm: expected a finite value > 0",
        ),
        (lambda: policies.head_value(LM), "head_value: expected a model with a value head"),
        (
            lambda: policies.re_control_expected(BASE, LM.logits, critics.genarm(LM), num_steps=1),
            "critic: expected a level critic",
        ),
        (lambda: draw(EDIT, LM_GIVEN | {"step_size": -0.1}), "step_size: expected a finite value >= 0"),
        (lambda: draw(EDIT, LM_GIVEN | {"step_size": jnp.ones(3)}), "step_size: expected a scalar or shape"),
        (
            lambda: draw(EDIT, {"policy": LM_PARAMS, "step_size": 0.1}),
            r"params: expected entries policy, value, step_size; found .*\(missing value\)",
        ),
        (
            lambda: draw(EDIT, {"policy": LM_PARAMS, "value": VALUE_PARAMS}),
            r"\(missing step_size\)",
        ),
        (
            lambda: draw(policies.re_control(BASE, LM.logits, lambda p, h: h, num_steps=1), LM_GIVEN),
            r"value \(.*lambda.*\): expected shape \(2,\), one number per row, found \(2, 16\)",
        ),
        (
            lambda: draw(
                policies.re_control(tree.policy(RAGGED), unembed, HEAD, num_steps=1),
                LM_GIVEN | {"policy": jnp.zeros((13, 3))},
            ),
            "re_control: expected a policy that gives hidden states",
        ),
    ],
)
def test_re_control_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def draw(policy, params):
    prompt = TokenBatch(jnp.ones((2, 2), jnp.int32), jnp.ones((2, 2), bool))
    return decoding.sample(policy, params, RNG, prompt, max_new_tokens=2, eos_ids=(0,))

"""The six laws of `jaxalign.types`, held against every Policy and decoder; the critics' are in test_laws_critics.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, rewards, testing
from jaxalign._arrays import NEGATIVE, is_supported, take_rows
from jaxalign.types import Policy, TokenBatch
from tests import cases
from tests.cases import tiny_lm
from tests.conftest import EOS, PROMPTS, needs_jit, padded

B, T = len(PROMPTS), 3
RNG = jax.random.key(0)
RESPONSES = jnp.array([[1, 2, 5], [3, 3, 9], [10, 4, 6], [2, 8, 1], [7, 1, 2]])


@pytest.fixture(scope="module")
def all_policies() -> dict[str, cases.Case]:
    built = cases.policy_cases()
    assert list(built) == cases.POLICIES, "tests/cases.py: keep the list of names beside the builders"
    return built


@pytest.fixture(scope="module", params=cases.CHECKED)
def case(request, all_policies) -> cases.Case:
    return all_policies[request.param]


@pytest.fixture(scope="module")
def prompts() -> TokenBatch:
    return padded(PROMPTS)


@pytest.fixture(scope="module")
def drawn(case, prompts):
    """(the case's policy, which counts its traces; the count of one `sample`; the sample)."""
    policy, traces = counted(case)
    completions = decoding.sample(policy, case.params, RNG, prompts, max_new_tokens=T, eos_ids=EOS)
    return policy, traces, list(traces), completions


def start(case: cases.Case, prompts: TokenBatch):
    """(jitted init's result, jitted step)."""
    init = jax.jit(case.policy.init, static_argnums=3)
    step = jax.jit(case.policy.step)
    state, output = init(case.params, RNG, prompts, T)
    return state, output, lambda state, token: step(case.params, RNG, state, token)


def counted(case: cases.Case) -> tuple[Policy, list[int]]:
    traces = [0]

    def init(*arguments):
        traces[0] += 1
        return case.policy.init(*arguments)

    return case.policy._replace(init=init), traces


def supported_tokens(output) -> jax.Array:
    """A token of positive probability per row, another one in each row where it can be."""
    order = jnp.argsort(-output.log_prob, axis=-1)
    return order[jnp.arange(B), jnp.array([0, 1, 2, 1, 0])].astype(jnp.int32)


def assert_outputs_equal(left, right, **tolerance):
    for name in ("log_prob", "log_prob_ref", "log_norm"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-5, atol=1e-5, err_msg=name)


# Laws 1, 2, 4, 5 and more, as for a user's own parts ------------------------------------------------------------------


def test_every_policy_keeps_the_laws_of_testing(case, prompts):
    testing.check_policy(case.policy, case.params, prompts, max_new_tokens=T, rtol=1e-5, atol=1e-5)


# Law 2 ---------------------------------------------------------------------------------------------------------------


def test_law_2_tilt_sends_minus_one_down_for_a_token_outside_its_candidates(all_policies, prompts):
    case = all_policies["tilt_args_4"]
    state, output, step = start(case, prompts)
    outside = jnp.argmin(output.log_prob, axis=-1).astype(jnp.int32)
    assert not is_supported(output.log_prob[jnp.arange(B), outside]).any()
    moved, _ = step(state, outside)
    np.testing.assert_array_equal(moved.policy.length, state.policy.length)
    token = supported_tokens(output)
    assert_outputs_equal(step(moved, token)[1], step(state, token)[1])


# Law 3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tilt_args_4", "tilt_genarm_all", "temperature", "top_p", "re_control"])
def test_law_3_a_value_per_prompt_is_that_prompts_own(all_policies, prompts, name):
    case = all_policies[name]
    key = next(k for k in ("beta", "temperature", "top_p", "step_size") if k in case.params)
    state, output, step = start(case, prompts)
    token = supported_tokens(output)
    _, together = step(state, token)
    for b in range(B):
        alone = cases.Case(case.policy, case.params | {key: case.params[key][b]})
        state_b, output_b, step_b = start(alone, prompts)
        assert_outputs_equal(take_rows(output_b, jnp.array([b])), take_rows(output, jnp.array([b])))
        _, found = step_b(state_b, token)
        assert_outputs_equal(take_rows(found, jnp.array([b])), take_rows(together, jnp.array([b])))


@needs_jit
def test_law_3_values_do_not_retrace(all_policies, prompts):
    case = all_policies["tilt_value_q_all"]
    traces = 0

    def counting_init(*arguments):
        nonlocal traces
        traces += 1
        return case.policy.init(*arguments)

    policy = case.policy._replace(init=counting_init)
    for beta in (0.5, 2.0, np.float32(3.0)):
        params = case.params | {"beta": jnp.asarray(beta)}
        for temperature in (0.3, 0.7, 0.0):
            decoding.sample(
                policy, params, RNG, prompts, max_new_tokens=T, eos_ids=EOS, temperature=jnp.asarray(temperature)
            )
    assert traces == 1


# Law 4 ---------------------------------------------------------------------------------------------------------------


def test_law_4_each_model_reads_its_own_template(prompts):
    base, arm = tiny_lm(0), tiny_lm(4)
    policy = policies.tilt(policies.language_model(base[0]), cases.critics.genarm(arm[0]))
    params = {"policy": base[1], "critic": arm[1], "beta": jnp.asarray(1.0)}
    other = padded([[9, *row, 2] for row in PROMPTS], side="right")
    output = start(cases.Case(policy, params), {"policy": prompts, "critic": other})[1]
    own = start(cases.Case(policies.language_model(base[0]), base[1]), prompts)[1].log_prob
    reward = start(cases.Case(policies.language_model(arm[0]), arm[1]), other)[1].log_prob
    np.testing.assert_allclose(output.log_prob, jax.nn.log_softmax(own + reward), rtol=1e-5, atol=1e-5)


def test_law_4_a_missing_entry_is_named(all_policies, prompts):
    case = all_policies["tilt_args_4"]
    with pytest.raises(ValueError, match="'critic'"):
        case.policy.init(case.params, RNG, {"policy": prompts}, T)


# Law 5 ---------------------------------------------------------------------------------------------------------------


def scored(case, prompts):
    return decoding.log_prob(case.policy, case.params, RNG, prompts, RESPONSES, jnp.ones((B, T), bool))


def increments(completions) -> np.ndarray:
    """Σ_t (log pi − log pi_ref + log_norm): what the tilts added to the base, before any normalisation."""
    return np.asarray((completions.log_prob - completions.log_prob_ref + completions.log_norm).sum(axis=1))


@pytest.mark.parametrize("name", ["language_model", "tabular", "top_k", "top_p"])
def test_law_5_a_truncation_adds_nothing_but_its_kept_mass(all_policies, prompts, name):
    completions = scored(all_policies[name], prompts)
    inside = np.asarray(completions.in_support)
    np.testing.assert_allclose(increments(completions)[inside], 0, atol=1e-5)
    if name in ("top_k", "top_p"):
        _state, output, _ = start(all_policies[name], prompts)
        kept = jnp.where(is_supported(output.log_prob), jnp.exp(output.log_prob_ref), 0).sum(axis=-1)
        assert bool((kept < 0.999).any())
        np.testing.assert_allclose(output.log_norm, jnp.log(kept), rtol=1e-4, atol=1e-5)


def test_law_5_nested_tilts_add_up(all_policies, prompts):
    inner, outer = all_policies["tilt_value_q_all"], all_policies["nested"]
    nested = increments(scored(outer, prompts))
    arm = cases.critic_cases()["genarm"]
    log_reward = scored(cases.Case(policies.language_model(tiny_lm(4)[0]), arm.params), prompts).log_prob.sum(axis=1)
    np.testing.assert_allclose(nested, increments(scored(inner, prompts)) + log_reward / 2, rtol=1e-4, atol=1e-4)


def test_law_5_temperature_tempers_the_increments_too(all_policies, prompts):
    inner = all_policies["tilt_genarm_all"]
    case = cases.Case(policies.temperature(inner.policy), {"policy": inner.params, "temperature": cases.BETA})
    below, above = scored(inner, prompts), scored(case, prompts)
    target = (np.asarray(below.log_prob_ref.sum(axis=1)) + increments(below)) / cases.BETA
    np.testing.assert_allclose(
        increments(above) + np.asarray(above.log_prob_ref.sum(axis=1)), target, rtol=1e-4, atol=1e-4
    )


def test_law_5_greedy_is_the_truncation_to_one_token(all_policies, prompts):
    lm = all_policies["language_model"]
    greedy = cases.Case(policies.temperature(lm.policy), {"policy": lm.params, "temperature": 0.0})
    _, output, _ = start(greedy, prompts)
    _, one, _ = start(cases.Case(policies.top_k(lm.policy, 1), lm.params), prompts)
    np.testing.assert_array_equal(is_supported(output.log_prob), is_supported(one.log_prob))
    np.testing.assert_allclose(output.log_norm, one.log_norm, rtol=1e-6)
    assert float(output.log_prob.min()) == np.float32(NEGATIVE)


# Law 6 ---------------------------------------------------------------------------------------------------------------


@needs_jit
def test_law_6_a_policy_is_traced_once_for_each_shape(case, prompts, drawn):
    policy, traces, first, _ = drawn
    assert first == [1]
    # The programs of the first sample may be gone by now (conftest.py): that of seed 1 is there for seed 2.
    decoding.sample(policy, case.params, jax.random.key(1), prompts, max_new_tokens=T, eos_ids=EOS)
    before = list(traces)
    decoding.sample(policy, case.params, jax.random.key(2), prompts, max_new_tokens=T, eos_ids=EOS)
    assert traces == before


@needs_jit
def test_law_6_a_new_shape_is_one_new_trace(all_policies, prompts):
    policy, traces = counted(all_policies["language_model"])
    for extra in (0, 2, 0, 2):
        batch = padded(PROMPTS, extra=extra)
        decoding.sample(policy, all_policies["language_model"].params, RNG, batch, max_new_tokens=T, eos_ids=EOS)
    assert traces == [2]


@needs_jit
def test_law_6_best_of_n_is_traced_once(all_policies, prompts):
    policy, traces = counted(all_policies["tilt_args_4"])
    lm, reward_params = tiny_lm(1, "reward")
    reward = rewards.from_model(lm)
    params = {"policy": all_policies["tilt_args_4"].params, "reward": reward_params}
    for seed in range(2):
        decoding.best_of_n(
            policy, reward, params, jax.random.key(seed), prompts, num_samples=3, max_new_tokens=T, eos_ids=EOS
        )
    assert traces == [1]


# Every policy goes into every decoder ---------------------------------------------------------------------------------


def test_every_policy_samples_what_it_says(case, prompts, drawn):
    """`sample` reports the log-probabilities that `log_prob` gives to the same tokens, and a proper KL."""
    _, _, _, drawn = drawn
    given = decoding.log_prob(case.policy, case.params, RNG, prompts, drawn.tokens, drawn.mask, eos_ids=EOS)
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        expected = getattr(given, name)
        if expected is not None:  # with_reference's parallel form gives no KL
            np.testing.assert_allclose(getattr(drawn, name), expected, rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(drawn.finished, given.finished)
    assert bool(given.in_support.all())
    assert bool((drawn.kl >= -1e-6).all())
    np.testing.assert_array_equal(drawn.truncated, ~drawn.finished)


def test_every_policy_goes_into_best_of_n(case, prompts, drawn):
    """Sample 0 of each prompt is what `sample` draws, under repeated rows; the best is the one of highest reward."""
    _, _, _, drawn = drawn
    params = {"policy": case.params, "reward": cases.table(8)[0]}
    chosen = decoding.best_of_n(
        case.policy, cases.weighted_tokens, params, RNG, prompts, num_samples=3, max_new_tokens=T, eos_ids=EOS
    )
    assert chosen.info.samples.tokens.shape == (B, 3, T)
    np.testing.assert_array_equal(chosen.info.samples.tokens[:, 0], drawn.tokens)
    np.testing.assert_allclose(chosen.info.samples.log_prob[:, 0], drawn.log_prob, rtol=2e-4, atol=2e-5)
    pick = np.asarray(chosen.info.reward).argmax(axis=1)
    np.testing.assert_array_equal(chosen.completions.tokens, np.asarray(chosen.info.samples.tokens)[np.arange(B), pick])

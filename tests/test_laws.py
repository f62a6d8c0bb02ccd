"""The six laws of `jaxalign.types`, held against every Policy, Critic and decoder."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, rewards, tree
from jaxalign.types import (
    NEGATIVE,
    Policy,
    TokenBatch,
    is_supported,
    repeat_rows,
    take_rows,
    where_rows,
)
from tests import cases
from tests.cases import tiny_lm
from tests.conftest import EOS, PROMPTS, VOCAB, needs_jit, padded

B, T = len(PROMPTS), 3
RNG = jax.random.key(0)
RESPONSES = jnp.array([[1, 2, 5], [3, 3, 9], [10, 4, 6], [2, 8, 1], [7, 1, 2]])


@pytest.fixture(scope="module")
def all_policies() -> dict[str, cases.Case]:
    built = cases.policy_cases()
    assert list(built) == cases.POLICIES, "tests/cases.py: keep the list of names beside the builders"
    return built


@pytest.fixture(scope="module")
def all_critics() -> dict[str, cases.CriticCase]:
    built = cases.critic_cases()
    assert list(built) == cases.CRITICS
    return built


@pytest.fixture(params=cases.CHECKED)
def case(request, all_policies) -> cases.Case:
    return all_policies[request.param]


@pytest.fixture(params=cases.CRITICS)
def critic_case(request, all_critics) -> cases.CriticCase:
    return all_critics[request.param]


def start(case: cases.Case, prompts: TokenBatch):
    """(jitted init's result, jitted step)."""
    init = jax.jit(case.policy.init, static_argnums=3)
    step = jax.jit(case.policy.step)
    state, output = init(case.params, RNG, prompts, T)
    return state, output, lambda state, token: step(case.params, RNG, state, token)


def supported_tokens(output) -> jax.Array:
    """A token of positive probability per row, another one in each row where it can be."""
    order = jnp.argsort(-output.log_prob, axis=-1)
    return order[jnp.arange(B), jnp.array([0, 1, 2, 1, 0])].astype(jnp.int32)


def assert_outputs_equal(left, right, **tolerance):
    for name in ("log_prob", "log_prob_ref", "log_norm"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-5, atol=1e-5, err_msg=name)


# Law 1 ---------------------------------------------------------------------------------------------------------------


def check_batch_first(state) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert leaf.shape[:1] == (B,), f"{jax.tree_util.keystr(path)}: shape {leaf.shape} has no batch axis first"
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), f"{jax.tree_util.keystr(path)}: a key in a state"


def test_law_1_every_policy_leaf_has_the_batch_first(case, prompts):
    state, output, step = start(case, prompts)
    check_batch_first((state, output))
    check_batch_first(step(state, supported_tokens(output)))


def test_law_1_rows_can_be_taken_and_repeated(case, prompts):
    state, output, step = start(case, prompts)
    token = supported_tokens(output)
    _, expected = step(state, token)
    index = jnp.array([4, 0, 0, 3, 1])
    _, found = step(take_rows(state, index), token[index])
    assert_outputs_equal(found, take_rows(expected, index))
    _, found = step(repeat_rows(state, 2), jnp.repeat(token, 2))
    assert_outputs_equal(found, repeat_rows(expected, 2))


@functools.partial(jax.jit, static_argnums=0)
def walk(critic, params, base_params, prompts, candidates, choice, token):
    """init, score, advance by `choice`, score again; the policy below is the tiny language model."""
    policy = cases.base_lm().policy
    below, output = policy.init(base_params, RNG, prompts, T)
    state = critic.init(params, RNG, prompts, T)
    q, proposal = critic.score(params, RNG, state, output, candidates)
    moved = critic.advance(params, proposal, choice)
    _, after = policy.step(base_params, RNG, below, token)
    return state, q, proposal, moved, critic.score(params, RNG, moved, after, candidates)[0]


def critic_walk(critic_case, prompts, candidates, choice=None):
    """The walk to candidate 1, or to `choice`."""
    choice = jnp.ones(B, jnp.int32) if choice is None else choice
    token = choice if candidates is None else jnp.take_along_axis(candidates, choice[:, None], axis=1)[:, 0]
    base = cases.base_lm().params
    return walk(critic_case.critic, critic_case.params, base, prompts, candidates, choice, token)


CANDIDATES = jnp.array([[5, 1, 9], [0, 2, 3], [10, 8, 7], [4, 1, 6], [3, 9, 2]], jnp.int32)


def test_law_1_every_critic_leaf_has_the_batch_first(critic_case, prompts):
    for candidates in (None, CANDIDATES):
        state, q, proposal, moved, again = critic_walk(critic_case, prompts, candidates)
        check_batch_first((state, q, proposal, moved, again))


def test_critics_score_candidates_as_they_score_the_vocabulary(critic_case, prompts):
    _, q_all, _, _, _ = critic_walk(critic_case, prompts, None)
    _, q, _, _, again = critic_walk(critic_case, prompts, CANDIDATES)
    np.testing.assert_allclose(q, jnp.take_along_axis(q_all, CANDIDATES, axis=1), rtol=2e-5, atol=2e-5)
    # Moving to candidate 1 of a list is moving to that token of the vocabulary.
    expected = critic_walk(critic_case, prompts, None, CANDIDATES[:, 1])[-1]
    np.testing.assert_allclose(again, jnp.take_along_axis(expected, CANDIDATES, axis=1), rtol=2e-5, atol=2e-5)


# Law 2 ---------------------------------------------------------------------------------------------------------------


def test_law_2_a_row_with_token_minus_one_stands_still(case, prompts):
    state, output, step = start(case, prompts)
    token = supported_tokens(output)
    once, first = step(state, token)
    _, second = step(once, supported_tokens(first))
    still = jnp.array([True, False, True, False, True])
    paused, _ = step(state, jnp.where(still, -1, token))
    # The rows that stood still move now, the others stand still.
    resumed, output_resumed = step(paused, jnp.where(still, token, -1))
    assert_outputs_equal(take_rows(output_resumed, jnp.flatnonzero(still)), take_rows(first, jnp.flatnonzero(still)))
    mixed = where_rows(still, output_resumed, first)
    _, found = step(resumed, supported_tokens(mixed))
    assert_outputs_equal(found, second)


def test_law_2_a_critic_with_choice_minus_one_stands_still(critic_case, prompts):
    policy = cases.base_lm().policy

    @jax.jit
    def stand(params, base_params):
        _, output = policy.init(base_params, RNG, prompts, T)
        state = critic_case.critic.init(params, RNG, prompts, T)
        q, proposal = critic_case.critic.score(params, RNG, state, output, CANDIDATES)
        stood = critic_case.critic.advance(params, proposal, jnp.full(B, -1))
        return q, critic_case.critic.score(params, RNG, stood, output, CANDIDATES)[0]

    q, again = stand(critic_case.params, cases.base_lm().params)
    np.testing.assert_allclose(again, q, rtol=1e-6, atol=1e-6)


def test_law_2_tilt_sends_minus_one_down_for_a_token_outside_its_candidates(all_policies, prompts):
    case = all_policies["tilt_args_4"]
    state, output, step = start(case, prompts)
    outside = jnp.argmin(output.log_prob, axis=-1).astype(jnp.int32)
    assert not is_supported(output.log_prob[jnp.arange(B), outside]).any()
    moved, _ = step(state, outside)
    np.testing.assert_array_equal(moved["policy"].length, state["policy"].length)
    token = supported_tokens(output)
    assert_outputs_equal(step(moved, token)[1], step(state, token)[1])


# Law 3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tilt_args_4", "tilt_autoregressive_all", "temperature", "top_p", "edit"])
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


def test_law_3_weights_per_prompt(all_critics, prompts):
    case = all_critics["weighted_increments"]
    lm = cases.base_lm()
    tilted = policies.tilt(lm.policy, case.critic)
    rows = jnp.array([[0.5, 0.8], [0.0, 1.0], [2.0, -0.5], [0.1, 0.1], [1.0, 0.0]])

    def log_prob(weights):
        params = {"policy": lm.params, "critic": case.params | {"weights": weights}, "beta": 1.0}
        return decoding.log_prob(tilted, params, RNG, prompts, RESPONSES, jnp.ones((B, T), bool)).log_prob

    together = log_prob(rows)
    for b in range(B):
        np.testing.assert_allclose(together[b], log_prob(rows[b])[b], rtol=1e-5, atol=1e-5)


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


def mirrored(params, prompts):
    """One TokenBatch at each model of params: the most detailed form of prompts."""
    if not isinstance(params, dict):
        return prompts
    out = {}
    if "policy" in params:
        out["policy"] = mirrored(params["policy"], prompts)
    if "reference" in params:
        out["reference"] = prompts
    if "adapters" in params:
        out["adapters"] = [prompts] * len(jax.tree.leaves(params["adapters"])[0])
    if "critic" in params:
        out["critic"] = mirrored(params["critic"], prompts)
    if "critics" in params:
        out["critics"] = [mirrored(p, prompts) for p in params["critics"]]
    return out or prompts


def test_law_4_one_batch_or_one_for_each_model(case, prompts):
    state, output, step = start(case, prompts)
    token = supported_tokens(output)
    state_m, output_m, _ = start(case, mirrored(case.params, prompts))
    assert_outputs_equal(output_m, output)
    assert_outputs_equal(step(state_m, token)[1], step(state, token)[1])


def test_law_4_each_model_reads_its_own_template(prompts):
    base, arm = tiny_lm(0), tiny_lm(4)
    policy = policies.tilt(policies.language_model(base[0]), cases.critics.autoregressive(arm[0]))
    params = {"policy": base[1], "critic": arm[1], "beta": jnp.asarray(1.0)}
    other = padded([[9, *row, 2] for row in PROMPTS], side="right")
    output = policy.init(params, RNG, {"policy": prompts, "critic": other}, T)[1]
    own = policies.language_model(base[0]).init(base[1], RNG, prompts, T)[1].log_prob
    reward = policies.language_model(arm[0]).init(arm[1], RNG, other, T)[1].log_prob
    np.testing.assert_allclose(output.log_prob, jax.nn.log_softmax(own + reward), rtol=1e-5, atol=1e-5)


def test_law_4_a_missing_entry_is_named(prompts):
    case = cases.policy_cases()["tilt_args_4"]
    with pytest.raises(ValueError, match="'critic'"):
        case.policy.init(case.params, RNG, {"policy": prompts}, T)


# Law 5 ---------------------------------------------------------------------------------------------------------------


def scored(case, prompts):
    return decoding.log_prob(case.policy, case.params, RNG, prompts, RESPONSES, jnp.ones((B, T), bool))


def increments(completions) -> np.ndarray:
    """Σ_t (log pi − log pi_ref + log_norm): what the tilts added to the base, before any normalisation."""
    return np.asarray((completions.log_prob - completions.log_prob_ref + completions.log_norm).sum(axis=1))


def test_law_5_probabilities_are_normalised_and_finite(case, prompts):
    state, output, step = start(case, prompts)
    for _ in range(2):
        np.testing.assert_allclose(jax.nn.logsumexp(output.log_prob, axis=-1), 0, atol=2e-5)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(output))
        state, output = step(state, supported_tokens(output))


@pytest.mark.parametrize("k", ["all", 4])
@pytest.mark.parametrize("name", cases.CRITICS)
def test_law_5_the_increments_of_a_tilt_are_its_scores(all_policies, all_critics, prompts, name, k):
    """Level: Σ = q(last token)/beta. Increment: Σ = Σ_t q_t/beta. Rows outside the candidates are left out."""
    case = all_policies[f"tilt_{name}_{k}"]
    completions = scored(case, prompts)
    inside = np.asarray(completions.in_support)
    assert inside.all() or k == 4
    critic, params, _ = all_critics[name]
    policy = cases.base_lm().policy

    @jax.jit
    def scores(params, base_params):
        below, output = policy.init(base_params, RNG, prompts, T)
        state, total = critic.init(params, RNG, prompts, T), 0.0
        for t in range(T):
            q, proposal = critic.score(params, RNG, state, output, None)
            q_t = q[jnp.arange(B), RESPONSES[:, t]]
            total = q_t if critic.kind == "level" else total + q_t
            state = critic.advance(params, proposal, RESPONSES[:, t])
            below, output = policy.step(base_params, RNG, below, RESPONSES[:, t])
        return total

    total = scores(params, cases.base_lm().params)
    np.testing.assert_allclose(increments(completions)[inside], (total / cases.BETA)[inside], rtol=1e-4, atol=1e-4)


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
    arm = cases.critic_cases()["autoregressive"]
    log_reward = scored(cases.Case(policies.language_model(tiny_lm(4)[0]), arm.params), prompts).log_prob.sum(axis=1)
    np.testing.assert_allclose(nested, increments(scored(inner, prompts)) + log_reward / 2, rtol=1e-4, atol=1e-4)


def test_law_5_temperature_tempers_the_increments_too(all_policies, prompts):
    inner = all_policies["tilt_autoregressive_all"]
    case = cases.Case(policies.temperature(inner.policy), {"policy": inner.params, "temperature": cases.BETA})
    below, above = scored(inner, prompts), scored(case, prompts)
    target = (np.asarray(below.log_prob_ref.sum(axis=1)) + increments(below)) / cases.BETA
    np.testing.assert_allclose(
        increments(above) + np.asarray(above.log_prob_ref.sum(axis=1)), target, rtol=1e-4, atol=1e-4
    )


def test_law_5_greedy_is_the_truncation_to_one_token(all_policies, prompts):
    lm = all_policies["language_model"]
    greedy = policies.temperature(lm.policy)
    output = greedy.init({"policy": lm.params, "temperature": 0.0}, RNG, prompts, T)[1]
    one = policies.top_k(lm.policy, 1).init(lm.params, RNG, prompts, T)[1]
    np.testing.assert_array_equal(is_supported(output.log_prob), is_supported(one.log_prob))
    np.testing.assert_allclose(output.log_norm, one.log_norm, rtol=1e-6)
    assert float(output.log_prob.min()) == np.float32(NEGATIVE)


# Law 6 ---------------------------------------------------------------------------------------------------------------


def counted(case: cases.Case) -> tuple[Policy, list[int]]:
    traces = [0]

    def init(*arguments):
        traces[0] += 1
        return case.policy.init(*arguments)

    return case.policy._replace(init=init), traces


@needs_jit
def test_law_6_a_policy_is_traced_once_for_each_shape(case, prompts):
    policy, traces = counted(case)
    for seed in range(2):
        decoding.sample(policy, case.params, jax.random.key(seed), prompts, max_new_tokens=T, eos_ids=EOS)
    assert traces == [1]


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
        decoding.best_of_n(policy, reward, params, jax.random.key(seed), prompts, n=3, max_new_tokens=T, eos_ids=EOS)
    assert traces == [1]


# Every policy goes into every decoder ---------------------------------------------------------------------------------


def test_every_policy_samples_what_it_says(case, prompts):
    """`sample` reports the log-probabilities that `log_prob` gives to the same tokens, and a proper KL."""
    drawn = decoding.sample(case.policy, case.params, RNG, prompts, max_new_tokens=T, eos_ids=EOS)
    given = decoding.log_prob(case.policy, case.params, RNG, prompts, drawn.tokens, drawn.mask, eos_ids=EOS)
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        expected = getattr(given, name)
        if expected is not None:  # with_reference's parallel form gives no KL
            np.testing.assert_allclose(getattr(drawn, name), expected, rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(drawn.finished, given.finished)
    assert bool(given.in_support.all())
    assert bool((drawn.kl >= -1e-6).all())
    np.testing.assert_array_equal(drawn.truncated, ~drawn.finished)


def test_every_policy_goes_into_best_of_n(case, prompts):
    """Sample 0 of each prompt is what `sample` draws, under repeated rows; the best is the one of highest reward."""
    lm, reward_params = tiny_lm(1, "reward")
    chosen = decoding.best_of_n(
        case.policy,
        rewards.from_model(lm),
        {"policy": case.params, "reward": reward_params},
        RNG,
        prompts,
        n=3,
        max_new_tokens=T,
        eos_ids=EOS,
    )
    assert chosen.samples.tokens.shape == (B, 3, T)
    drawn = decoding.sample(case.policy, case.params, RNG, prompts, max_new_tokens=T, eos_ids=EOS)
    np.testing.assert_array_equal(chosen.samples.tokens[:, 0], drawn.tokens)
    np.testing.assert_allclose(chosen.samples.log_prob[:, 0], drawn.log_prob, rtol=2e-4, atol=2e-5)
    pick = np.asarray(chosen.reward).argmax(axis=1)
    np.testing.assert_array_equal(chosen.best.tokens, np.asarray(chosen.samples.tokens)[np.arange(B), pick])


def test_every_critic_tilts_a_tabular_policy(all_critics, prompts):
    for name, (critic, critic_params, needs_hidden) in all_critics.items():
        if needs_hidden:
            continue
        policy = policies.tilt(tree.policy(cases.TREE), critic)
        params = {"policy": cases.table(0), "critic": critic_params, "beta": jnp.asarray(1.0)}
        drawn = decoding.sample(policy, params, RNG, prompts, max_new_tokens=3, eos_ids=EOS)
        assert drawn.tokens.shape == (B, 3), name
        assert VOCAB > int(drawn.tokens.max()) >= 0


def test_hidden_value_needs_hidden_states(all_critics, prompts):
    critic, params, _ = all_critics["hidden_value"]
    policy = policies.tilt(tree.policy(cases.TREE), critic)
    with pytest.raises(ValueError, match="hidden"):
        policy.init({"policy": cases.table(0), "critic": params, "beta": 1.0}, RNG, prompts, T)

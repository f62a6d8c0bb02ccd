"""The laws of `jaxalign.types`, held against every Critic and the tilts by them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, testing, tree
from jaxalign._arrays import where_rows
from jaxalign.types import TokenBatch
from tests import cases
from tests.conftest import EOS, PROMPTS, VOCAB, padded
from tests.test_laws import RESPONSES, RNG, B, T, increments, scored, start

CANDIDATES = jnp.array([[5, 1, 9], [0, 2, 3], [10, 8, 7], [4, 1, 6], [3, 9, 2]], jnp.int32)


@pytest.fixture(scope="module")
def all_critics() -> dict[str, cases.CriticCase]:
    built = cases.critic_cases()
    assert list(built) == cases.CRITICS
    return built


@pytest.fixture(scope="module", params=cases.CRITICS)
def critic_case(request, all_critics) -> cases.CriticCase:
    return all_critics[request.param]


@pytest.fixture(scope="module")
def prompts() -> TokenBatch:
    return padded(PROMPTS)


@pytest.fixture(scope="module")
def base(prompts):
    """`start` of the tiny language model that the critics tilt."""
    return start(cases.base_lm(), prompts)


# Each part of a critic is compiled once for all its tests.


@functools.partial(jax.jit, static_argnums=0)
def begin(critic, params, prompts):
    return critic.init(params, RNG, prompts, T)


@functools.partial(jax.jit, static_argnums=0)
def score(critic, params, state, output, candidates):
    return critic.score(params, RNG, state, output, candidates)


@functools.partial(jax.jit, static_argnums=0)
def advance(critic, params, proposal, choice):
    return critic.advance(params, proposal, choice)


def walk(critic_case, prompts, base, candidates, choice=None):
    """(state, q, proposal, moved, q again): init, score, advance by `choice` (1 when None), score again; the policy
    below goes along, and a row of choice -1 keeps its output."""
    critic, params, _ = critic_case
    choice = jnp.ones(B, jnp.int32) if choice is None else choice
    token = choice
    if candidates is not None:
        token = jnp.where(choice < 0, -1, candidates[jnp.arange(B), jnp.maximum(choice, 0)])
    below, output, step = base
    state = begin(critic, params, prompts)
    q, proposal = score(critic, params, state, output, candidates)
    moved = advance(critic, params, proposal, choice)
    after = where_rows(choice >= 0, step(below, token)[1], output)
    return state, q, proposal, moved, score(critic, params, moved, after, candidates)[0]


def test_every_critic_keeps_the_laws_of_testing(critic_case, all_critics, prompts):
    critic, params, needs_hidden = critic_case
    below = cases.base_lm() if needs_hidden else cases.Case(None, None)
    testing.check_critic(
        critic,
        params,
        prompts,
        policy=below.policy,
        policy_params=below.params,
        vocab_size=VOCAB,
        max_new_tokens=T,
        per_prompt=("weights", "beta"),
        # Law 9 through roll-outs takes longest to compile; test_laws.py holds it on a table.
        gradients=critic is not all_critics["transfer_q"].critic,
    )


def test_critics_score_candidates_as_they_score_the_vocabulary(critic_case, prompts, base):
    _, q_all, _, _, _ = walk(critic_case, prompts, base, None)
    _, q, _, _, again = walk(critic_case, prompts, base, CANDIDATES)
    np.testing.assert_allclose(q, jnp.take_along_axis(q_all, CANDIDATES, axis=1), rtol=2e-5, atol=2e-5)
    # Moving to candidate 1 of a list is moving to that token of the vocabulary.
    expected = walk(critic_case, prompts, base, None, CANDIDATES[:, 1])[-1]
    np.testing.assert_allclose(again, jnp.take_along_axis(expected, CANDIDATES, axis=1), rtol=2e-5, atol=2e-5)


def test_law_2_a_critic_with_choice_minus_one_stands_still(critic_case, prompts, base):
    """Alone, and beside rows that move."""
    q, moved = map(np.asarray, walk(critic_case, prompts, base, CANDIDATES)[1::3])
    for still in (np.ones(B, bool), np.array([True, False, True, False, True])):
        choice = jnp.asarray(np.where(still, -1, 1), jnp.int32)
        again = np.asarray(walk(critic_case, prompts, base, CANDIDATES, choice)[-1])
        np.testing.assert_allclose(again[still], q[still], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(again[~still], moved[~still], rtol=1e-5, atol=1e-5)


def test_law_3_weights_per_prompt(all_critics, prompts):
    case = all_critics["weighted_increments"]
    lm = cases.base_lm()
    tilted = policies.tilt(lm.policy, case.critic)
    rows = np.array([[0.5, 0.8], [0.0, 1.0], [2.0, -0.5], [0.1, 0.1], [1.0, 0.0]], np.float32)

    def log_prob(weights):
        params = {"policy": lm.params, "critic": case.params | {"weights": jnp.asarray(weights)}, "beta": 1.0}
        return decoding.log_prob(tilted, params, RNG, prompts, RESPONSES, jnp.ones((B, T), bool)).log_prob

    together = log_prob(rows)
    for b in range(B):
        np.testing.assert_allclose(together[b], log_prob(rows[b])[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", ["all", 4])
def test_law_5_the_increments_of_a_tilt_are_its_scores(critic_case, prompts, base, k):
    """Level: Σ = q(last token)/beta. Increment: Σ = Σ_t q_t/beta. Rows outside the candidates are left out."""
    critic, params, _ = critic_case
    tilted = policies.tilt(cases.base_lm().policy, critic, top_k=None if k == "all" else k)
    below = {"policy": cases.base_lm().params, "critic": params, "beta": cases.BETA}
    completions = scored(cases.Case(tilted, below), prompts)
    inside = np.asarray(completions.in_support)
    assert inside.all() or k == 4
    below, output, step = base
    state, total = begin(critic, params, prompts), np.zeros(B)
    for t in range(T):
        q, proposal = score(critic, params, state, output, None)
        q_t = np.asarray(q)[np.arange(B), RESPONSES[:, t]]
        total = q_t if critic.kind == "level" else total + q_t
        state = advance(critic, params, proposal, RESPONSES[:, t])
        below, output = step(below, RESPONSES[:, t])
    np.testing.assert_allclose(increments(completions)[inside], (total / cases.BETA)[inside], rtol=1e-4, atol=1e-4)


def test_every_critic_tilts_a_tabular_policy(all_critics, prompts):
    """Each is traced above a policy that is no language model; a level and an increment are drawn too."""
    for name, (critic, critic_params, needs_hidden) in all_critics.items():
        if needs_hidden:
            continue
        policy = policies.tilt(tree.policy(cases.TREE), critic)
        params = {"policy": cases.table(0), "critic": critic_params, "beta": jnp.asarray(1.0)}
        draw = functools.partial(decoding.sample, policy, params, prompts=prompts, max_new_tokens=3, eos_ids=EOS)
        assert jax.eval_shape(draw, RNG).tokens.shape == (B, 3), name
        if name in ("value_q", "genarm"):
            drawn = draw(RNG)
            assert VOCAB > int(drawn.tokens.max()) >= 0
            assert bool(jnp.isfinite(drawn.log_prob).all())


def test_hidden_value_needs_hidden_states(all_critics, prompts):
    critic, params, _ = all_critics["hidden_value"]
    policy = policies.tilt(tree.policy(cases.TREE), critic)
    with pytest.raises(ValueError, match="hidden"):
        policy.init({"policy": cases.table(0), "critic": params, "beta": 1.0}, RNG, prompts, T)

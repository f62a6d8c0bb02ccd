"""QUEST: the exact transition matrix and its stationary law, the sampler against it, and language models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, rewards, tree
from jaxalign.decoding._quest import log_accept
from jaxalign.types import TokenBatch
from tests import exact
from tests.conftest import EOS, PROMPTS, needs_jit, padded, tiny_lm
from tests.sampling import chi_square, index_of

RNG = jax.random.key(0)
TREE = tree.Tree(3, 3, eos_id=0)
BETA = 0.6


def transitions(t: tree.Tree, base: jax.Array, accept) -> np.ndarray:
    """P [M,M] of one move: P(y,y') = Σ_i (1/|y|)·1[same first i tokens]·pi(y'_i..|y'_<i)·accept(y,y'), i < |y|; what is
    not accepted stays."""
    tokens, mask = t.responses
    each = np.where(mask, np.asarray(base)[t.nodes, tokens], 0)
    length = mask.sum(1)
    ratio = np.asarray(accept(length))
    proposed = np.zeros((t.num_responses, t.num_responses))
    for i in range(t.horizon):
        alike = (tokens[:, None, :i] == tokens[None, :, :i]).all(-1) & (length[:, None] > i) & (length[None] > i)
        proposed += alike / length[:, None] * np.exp(each[:, i:].sum(1))[None]
    np.testing.assert_allclose(proposed.sum(1), 1, atol=1e-12)
    moved = proposed * np.minimum(1, np.exp(ratio))
    return moved + np.diag(1 - moved.sum(1))


def acceptance(reward: jax.Array, beta: float, *, lengths: bool = True):
    def accept(length: np.ndarray) -> jax.Array:
        n = length if lengths else np.ones_like(length)
        return log_accept(reward[:, None], reward[None], n[:, None], n[None], beta=beta)

    return accept


@pytest.mark.parametrize(
    ("t", "beta"), [(TREE, 0.6), (tree.Tree(2, 4, eos_id=0), 0.3), (tree.Tree(3, 2, eos_id=None), 1.0)]
)
def test_quest_the_gibbs_law_is_stationary_and_needs_the_length_factor(t, beta):
    """g·P = g to 1e-12 for responses of 1 to T tokens, in detailed balance, from any start; without |y|/|y'| it is not,
    unless all lengths are equal."""
    with jax.enable_x64(True):
        for seed in range(3):
            base, reward = exact.tables(t, seed)
            target = np.exp(tree.optimal_log_prob(t, base, reward, beta=beta))
            move = transitions(t, base, acceptance(reward, beta))
            np.testing.assert_allclose(target @ move, target, atol=1e-12)
            flow = target[:, None] * move
            np.testing.assert_allclose(flow, flow.T, atol=1e-12)
            assert np.abs(np.linalg.matrix_power(move, 1 << 20) - target).max() < 1e-8
            without = transitions(t, base, acceptance(reward, beta, lengths=False))
            drift = np.abs(target @ without - target).max()
            assert drift < 1e-12 if t.eos_id is None else drift > 1e-3


def test_quest_acceptance_of_forbidden_responses():
    ratio = log_accept(
        *(jnp.asarray(x) for x in ([0.0, -jnp.inf, -jnp.inf], [-jnp.inf, 0.0, -jnp.inf])), 2, 3, beta=0.5
    )
    np.testing.assert_array_equal(ratio, [-jnp.inf, jnp.inf, jnp.inf])


def run(moves: int, *, count: int, seed: int = 0, beta=BETA, prompts=None, tables=None, **changes):
    base, reward = exact.tables(TREE, 4) if tables is None else tables
    return decoding.quest(
        tree.policy(TREE),
        tree.reward(TREE),
        {"policy": base, "reward": reward, "beta": beta},
        jax.random.key(seed),
        tree.prompts(count) if prompts is None else prompts,
        num_steps=moves,
        max_new_tokens=3,
        eos_ids=(0,),
        **changes,
    )


@functools.cache
def chains():
    return run(6, count=20_000, keep_states=True)


def test_quest_samples_its_exact_law_after_each_number_of_moves():
    """20,000 chains: the states after 0, 1, 2 and 6 moves against pi·P^m, chi-squared with 14 degrees of freedom below
    its 1 − 1e-6 quantile; and the law without the length factor is told from it."""
    base, reward = exact.tables(TREE, 4)
    start = np.exp(np.asarray(tree.response_log_prob(TREE, base), np.float64))
    move = transitions(TREE, base, acceptance(reward, BETA))
    without = transitions(TREE, base, acceptance(reward, BETA, lengths=False))
    found = index_of(TREE, chains().info.states)
    for m in (0, 1, 2, 6):
        law = start @ np.linalg.matrix_power(move, m)
        assert chi_square(found[:, m], law) < 56
    wrong = start @ np.linalg.matrix_power(without, 6)
    assert chi_square(found[:, 6], wrong) > 100


def test_quest_one_move_has_the_exact_transition_probabilities():
    """Each pair (y, y') of 20,000 first moves, as one chi-squared over the pairs expected more than 5 times: at most
    164 of them, of which the 1 − 1e-6 quantile is 265."""
    base, reward = exact.tables(TREE, 4)
    move = transitions(TREE, base, acceptance(reward, BETA))
    found = index_of(TREE, chains().info.states)
    count = np.zeros_like(move)
    np.add.at(count, (found[:, 0], found[:, 1]), 1)
    assert (count[move < 1e-12] == 0).all()
    expected = count.sum(1, keepdims=True) * move
    seen = expected > 5
    assert 40 < seen.sum() <= 164
    assert ((count - expected)[seen] ** 2 / expected[seen]).sum() < 265


def test_quest_keeps_its_books():
    """Rewards are those of the states, a rejected move keeps the state, an accepted one keeps what was in front of the
    cut, and the records are those of teacher forcing."""
    chain, (base, reward) = chains(), exact.tables(TREE, 4)
    found = index_of(TREE, chain.info.states)
    np.testing.assert_allclose(chain.info.reward, np.asarray(reward)[found], rtol=1e-6)
    np.testing.assert_array_equal(index_of(TREE, chain.completions), found[:, -1])
    assert (found[:, 1:] == found[:, :-1])[~np.asarray(chain.info.accepted)].all()
    np.testing.assert_allclose(chain.info.accept_rate, np.asarray(chain.info.accepted).mean(1), rtol=1e-6)
    each = np.where(chain.completions.mask, np.asarray(base)[TREE.nodes, TREE.responses[0]][found[:, -1]], 0)
    np.testing.assert_allclose(chain.completions.log_prob, each, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        chain.completions.finished, np.asarray(chain.completions.mask & (chain.completions.tokens == 0)).any(1)
    )
    short = run(2, count=20_000)
    assert short.info.states is None
    np.testing.assert_array_equal(index_of(TREE, short.completions), found[:, 2])
    np.testing.assert_array_equal(short.info.reward, chain.info.reward[:, :3])


def test_quest_beta_and_tables_per_prompt():
    """A prompt of large beta accepts nearly all but for length; one of small beta only goes up."""
    tables = [jnp.stack(x) for x in zip(*(exact.tables(TREE, s) for s in (4, 5)), strict=True)]
    prompts = tree.prompts(2)
    chain = run(40, count=2, beta=jnp.array([1e6, 1e-6]), prompts=prompts, tables=tables, keep_states=True)
    found = index_of(TREE, chain.info.states)
    np.testing.assert_allclose(
        chain.info.reward, np.stack([np.asarray(tables[1])[b, found[b]] for b in range(2)]), rtol=1e-6
    )
    assert (np.diff(np.asarray(chain.info.reward)[1]) >= 0).all()
    assert float(chain.info.accept_rate[0]) > 0.6


# Language models ------------------------------------------------------------------------------------------------------


@functools.cache
def models():
    (lm, base), (judge, judge_params) = tiny_lm(0, num_layers=1), tiny_lm(1, "reward", num_layers=1)
    params = {"policy": base, "reward": judge_params, "beta": jnp.linspace(0.2, 1.0, 5)}
    return policies.language_model(lm), rewards.from_model(judge), params


def generate(policy, reward, params, prompts, seed: int = 0, **changes):
    arguments = {"num_steps": 5, "max_new_tokens": 4, "eos_ids": EOS, "keep_states": True} | changes
    return decoding.quest(policy, reward, params, jax.random.key(seed), prompts, **arguments)


@needs_jit
def test_quest_of_language_models_is_traced_once_and_its_records_are_those_of_its_texts(prompts):
    policy, reward, params = models()
    traces = []

    def init(*arguments):
        traces.append(1)
        return policy.init(*arguments)

    counted = policy._replace(init=init)
    chain = generate(counted, reward, params, prompts)
    generate(counted, reward, {**params, "beta": params["beta"] * 2}, prompts, 1)
    assert traces == [1]
    assert chain.info.states.tokens.shape == (5, 6, 4)
    assert 0 < float(chain.info.accept_rate.mean()) < 1
    for m in (0, 5):
        drawn = jax.tree.map(lambda x, m=m: x[:, m], chain.info.states)
        given = decoding.log_prob(policy, params["policy"], RNG, prompts, drawn.tokens, drawn.mask, eos_ids=EOS)
        np.testing.assert_allclose(drawn.log_prob, given.log_prob, rtol=2e-4, atol=2e-5)
        np.testing.assert_array_equal(drawn.finished, given.finished)
        score = reward(params["reward"], *decoding.join(prompts, drawn), jnp.arange(5))
        np.testing.assert_allclose(chain.info.reward[:, m], score, rtol=1e-4, atol=1e-5)
    last = TokenBatch(prompts.tokens[3:4], prompts.mask[3:4], jnp.array([3]))
    alone = generate(policy, reward, {**params, "beta": params["beta"][3]}, last)
    np.testing.assert_array_equal(alone.info.states.tokens[0], chain.info.states.tokens[3])
    np.testing.assert_array_equal(alone.info.accepted[0], chain.info.accepted[3])


def test_quest_refuses_what_is_no_request():
    policy, reward, params = models()
    prompts = padded(PROMPTS)
    for changes, message in (
        ({"num_steps": -1}, "num_steps: expected at least 0, found -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"temperature": -1.0}, "temperature: expected a value >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(policy, reward, params, prompts, **changes)
    with pytest.raises(ValueError, match="beta: expected a value > 0"):
        generate(policy, reward, {**params, "beta": -1.0}, prompts)
    with pytest.raises(ValueError, match=r"params: expected entries .*\(missing beta\)"):
        generate(policy, reward, {name: params[name] for name in ("policy", "reward")}, prompts)
    broken = rewards.from_numpy(lambda t, m, p, i: np.where(i == 2, np.nan, 0.0))
    with pytest.raises(ValueError, match=r"reward: expected numbers, found NaN for prompts \[2\]"):
        generate(policy, broken, {**params, "reward": None}, prompts)

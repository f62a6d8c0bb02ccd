"""CARDS: where segments end, what passes, what the cap keeps, its law where it has one, and language models."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, rewards, tree
from jaxalign.decoding.stopping import entropy as predictive_entropy
from jaxalign.types import CheckedReward, TokenBatch
from tests import exact
from tests.conftest import EOS, PROMPTS, needs_jit, padded, tiny_lm
from tests.sampling import chi_square, index_of

RNG = jax.random.key(0)
TREE = tree.Tree(3, 3, eos_id=0)


def prefix_reward(params, tokens, mask, prompt_length, index):
    """params {"weight": [V], "length": number}: the weights of the response's tokens, summed, and a price per token;
    one number for any text, finished or not."""
    response = mask & (jnp.cumsum(mask, axis=1) > prompt_length[:, None])
    return jnp.where(response, params["weight"][tokens] + params["length"], 0).sum(axis=1)


REWARD = CheckedReward(prefix_reward)
WEIGHT = {"weight": jnp.array([0.3, 1.0, -0.7]), "length": jnp.asarray(0.1)}


def run(*, count: int, entropy, threshold=1.0, beta=0.5, tries: int = 3, seed: int = 0, base=None, sizes=None, **more):
    base = exact.tables(TREE, 4)[0] if base is None else base
    params = {"policy": base, "reward": WEIGHT, "beta": beta, "reward_threshold": threshold}
    params |= {"entropy_threshold": entropy, **more}
    return decoding.cards(
        tree.policy(TREE),
        REWARD,
        params,
        jax.random.key(seed),
        exact.one_prompt(count)._replace(index=jnp.arange(count)),
        max_new_tokens=3,
        eos_ids=(0,),
        max_tries=tries,
        **(sizes or {}),
    )


def response_reward() -> np.ndarray:
    """[M] of the whole responses of the tree."""
    tokens, mask = TREE.responses
    return np.where(mask, np.asarray(WEIGHT["weight"])[tokens] + float(WEIGHT["length"]), 0).sum(1)


def test_cards_predictive_entropy_by_hand():
    law = jnp.log(jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]]))
    np.testing.assert_allclose(predictive_entropy(law), [np.log(2), 0, 1.5 * np.log(2)], rtol=1e-6)
    assert np.isnan(predictive_entropy(jnp.full((1, 3), jnp.nan))).all()


def segment_law(base, starts: set[int], *, threshold, beta, tries: int, start) -> np.ndarray:
    """The exact law [M] of the decoder: a segment ends at a state of `starts` or with the response. From each start
    the proposals are drawn one after the other: the first that passes is kept, or the best of `tries`."""
    table = np.exp(np.asarray(base, np.float64))
    weight = np.asarray(WEIGHT["weight"], np.float64) + float(WEIGHT["length"])
    law = np.zeros(TREE.num_responses)

    def segments(state: int, length: int, paid: float, p: float):
        """(probability, reward, tokens so far, state reached, response completed) of each segment from a state."""
        for z in range(3):
            mass, reward, n = p * table[state, z], paid + weight[z], length + 1
            end, child = TREE.leaf[state, z], state * 3 + 1 + z
            if end >= 0:
                yield mass, reward, n, None, int(end)
            elif child in starts:
                yield mass, reward, n, child, None
            else:
                yield from segments(child, n, reward, mass)

    def go(state: int, length: int, paid: float, p: float):
        found = list(segments(state, length, paid, 1.0))
        mass = np.array([f[0] for f in found])
        reward = np.array([f[1] for f in found])
        goal = start + (threshold - start) * np.array([f[2] for f in found]) / 3
        accept = np.minimum(1, np.exp((reward - goal) / beta))
        kept = np.zeros(len(found))
        for rounds in range(tries):
            kept += mass * accept * (mass @ (1 - accept)) ** rounds
        for draws in itertools.product(range(len(found)), repeat=tries):
            kept[max(draws, key=lambda i: reward[i])] += np.prod((mass * (1 - accept))[list(draws)])
        for share, (_, r, n, child, response) in zip(kept, found, strict=True):
            if response is None:
                go(child, n, r, p * share)
            else:
                law[response] += p * share

    go(0, 0, 0.0, 1.0)
    np.testing.assert_allclose(law.sum(), 1, atol=1e-9)
    return law


@pytest.mark.parametrize(
    ("entropy", "start"),
    [(0.0, 1.0), ("between", 1.0), ("between", 0.2), (10.0, 1.0)],
    ids=["all", "some", "rising", "one"],
)
def test_cards_draws_the_law_of_its_definition(entropy, start):
    """Every token a segment, some, and the whole response: 8,000 draws each, chi-squared with 14 degrees of freedom
    below its 1 − 1e-6 quantile; the base's law is told from it."""
    base = exact.tables(TREE, 4)[0]
    level = np.asarray(predictive_entropy(base))
    if entropy == "between":  # of the two states after one token, one begins a segment
        entropy = float(level[2:4].mean())
        assert (level[2:4] >= entropy).sum() == 1
    found = run(count=8000, entropy=jnp.asarray(entropy), reward_start=jnp.asarray(start))
    starts = set(np.flatnonzero(level >= entropy).tolist())
    index = index_of(TREE, found.completions)
    assert chi_square(index, segment_law(base, starts, threshold=1.0, beta=0.5, tries=3, start=start)) < 56
    assert chi_square(index, np.exp(tree.response_log_prob(TREE, base))) > 200
    np.testing.assert_allclose(found.info.reward, response_reward()[index], rtol=1e-5, atol=1e-6)


def test_cards_counts_its_segments_tries_and_calls():
    """Every token a segment: as many segments as tokens. One segment: one. A goal that nothing misses: one try each;
    one that nothing reaches: the cap each time, and best-of-tries."""

    def length(found):
        return np.asarray(found.completions.mask).sum(1)

    goal = {"reward_start": jnp.asarray(-50.0)}
    easy = run(count=8000, entropy=jnp.asarray(0.0), threshold=-50.0, **goal)
    np.testing.assert_array_equal(easy.info.segments, length(easy))
    np.testing.assert_array_equal(easy.info.tries, length(easy))
    np.testing.assert_array_equal(easy.info.policy_steps, length(easy))
    assert (easy.info.capped == 0).all()
    hard = run(count=8000, entropy=jnp.asarray(10.0), threshold=500.0, reward_start=jnp.asarray(500.0))
    np.testing.assert_array_equal(hard.info.segments, 1)
    np.testing.assert_array_equal(hard.info.capped, 1)
    np.testing.assert_array_equal(hard.info.tries, 3)
    assert (np.asarray(hard.info.policy_steps) >= length(hard)).all()
    law = np.exp(
        tree.best_of_n_law(tree.response_log_prob(TREE, exact.tables(TREE, 4)[0]), score=response_reward(), n=3)
    )
    assert chi_square(index_of(TREE, hard.completions), law) < 56


def test_cards_segment_sizes():
    """At least two tokens where every token is uncertain; at most one where none is."""
    fixed = {"threshold": -50.0, "reward_start": jnp.asarray(-50.0)}
    found = run(count=500, entropy=jnp.asarray(0.0), sizes={"min_segment": 2}, **fixed)
    np.testing.assert_array_equal(found.info.segments, (np.asarray(found.completions.mask).sum(1) + 1) // 2)
    found = run(count=500, entropy=jnp.asarray(50.0), sizes={"max_segment": 1}, **fixed)
    np.testing.assert_array_equal(found.info.segments, np.asarray(found.completions.mask).sum(1))


# Language models ------------------------------------------------------------------------------------------------------


@functools.cache
def models():
    (lm, base), (judge, judge_params) = tiny_lm(0, num_layers=1), tiny_lm(1, "reward", num_layers=1)
    params = {
        "policy": base,
        "reward": judge_params,
        "beta": jnp.linspace(0.2, 1.0, 5),
        "reward_threshold": 1.0,
        "reward_start": 0.0,
        "entropy_threshold": 2.2,  # some tokens of an almost uniform model begin a segment
    }
    return policies.language_model(lm), rewards.from_model(judge), params


def generate(policy, reward, params, prompts, seed: int = 0, **changes):
    arguments = {"max_new_tokens": 6, "eos_ids": EOS, "max_tries": 4} | changes
    return decoding.cards(policy, reward, params, jax.random.key(seed), prompts, **arguments)


@needs_jit
def test_cards_of_language_models_is_traced_once_and_rows_are_independent(prompts):
    policy, reward, params = models()
    traces = []

    def init(*arguments):
        traces.append(1)
        return policy.init(*arguments)

    counted = policy._replace(init=init)
    found = generate(counted, reward, params, prompts)
    generate(counted, reward, {**params, "beta": params["beta"] * 2, "entropy_threshold": 2.0}, prompts, 1)
    assert traces == [1]
    drawn = found.completions
    given = decoding.log_prob(policy, params["policy"], RNG, prompts, drawn.tokens, drawn.mask, eos_ids=EOS)
    np.testing.assert_allclose(drawn.log_prob, given.log_prob, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(drawn.finished, given.finished)
    np.testing.assert_array_equal(drawn.truncated, ~given.finished)
    score = reward(params["reward"], *decoding.join(prompts, drawn), jnp.arange(5))
    np.testing.assert_allclose(found.info.reward, score, rtol=1e-4, atol=1e-5)
    assert (found.info.tries >= found.info.segments).all()
    length = np.asarray(drawn.mask).sum(axis=1)
    assert len(set((length - np.asarray(found.info.segments)).tolist())) > 1  # ragged: rows end their segments apart
    assert (found.info.policy_steps >= length).all()
    last = TokenBatch(prompts.tokens[3:4], prompts.mask[3:4], jnp.array([3]))
    alone = generate(policy, reward, {**params, "beta": params["beta"][3]}, last)
    np.testing.assert_array_equal(alone.completions.tokens[0], drawn.tokens[3])
    for name in ("segments", "tries", "capped", "policy_steps"):
        assert int(getattr(alone.info, name)[0]) == int(getattr(found.info, name)[3])


def test_cards_refuses_what_is_no_request():
    policy, reward, params = models()
    prompts = padded(PROMPTS)
    for changes, message in (
        ({"max_tries": 0}, "max_tries: expected at least 1, found 0"),
        ({"min_segment": 0}, "min_segment: expected at least 1, found 0"),
        ({"min_segment": 3, "max_segment": 2}, "min_segment, max_segment"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(policy, reward, params, prompts, **changes)
    for changes, message in (
        ({"beta": 0.0}, "beta: expected a value > 0"),
        ({"reward_threshold": float("nan")}, "reward_threshold: expected finite numbers"),
        ({"reward_start": float("inf")}, "reward_start: expected finite numbers"),
        ({"entropy_threshold": -1.0}, "entropy_threshold: expected a value >= 0"),
        ({"entropy_threshold": jnp.ones(3)}, r"entropy_threshold: expected a scalar or shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(policy, reward, {**params, **changes}, prompts)
    for name in ("beta", "reward_threshold", "entropy_threshold", "reward"):
        with pytest.raises(ValueError, match=rf"params: expected entries .*\(missing {name}\)"):
            generate(policy, reward, {key: value for key, value in params.items() if key != name}, prompts)
    broken = rewards.from_numpy(lambda t, m, p, i: np.where(i == 2, np.nan, 0.0))
    with pytest.raises(ValueError, match=r"reward: expected numbers, found NaN for prompts \[2\]"):
        generate(policy, broken, {**params, "reward": None}, prompts)


def test_cards_kl_bound_is_the_surprise_of_passing():
    """One segment: the mean over 8,000 draws is −log of the share of base draws that pass, within five standard errors;
    where nothing passes, best-of-n's bound."""
    found = run(count=8000, entropy=jnp.asarray(10.0), threshold=2.0, tries=400)
    base = np.exp(np.asarray(tree.response_log_prob(TREE, exact.tables(TREE, 4)[0])))
    share = (base * np.minimum(1, np.exp((response_reward() - 2.0) / 0.5))).sum()
    bound = np.asarray(found.kl.value)
    assert (found.info.capped == 0).all()
    assert abs(bound.mean() + np.log(share)) < 5 * bound.std() / np.sqrt(len(bound))
    law = np.bincount(index_of(TREE, found.completions), minlength=len(base)) / len(bound)
    assert np.where(law > 0, law * np.log(np.where(law > 0, law, 1) / base), 0).sum() < -np.log(share)
    hard = run(count=4, entropy=jnp.asarray(10.0), threshold=500.0)
    np.testing.assert_allclose(hard.kl.value, np.log(3) - 2 / 3, rtol=1e-6)

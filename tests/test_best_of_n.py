"""Around best-of-n: the estimate for every n from one set of samples, and draws until a threshold is reached."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, metrics, policies, rewards, tree
from tests import exact
from tests.cases import weighted_tokens
from tests.conftest import EOS, PROMPTS, padded, tiny_lm
from tests.sampling import assert_mean, chi_square, index_of

TREE = tree.Tree(3, 3, eos_id=0)


# Equal scores ---------------------------------------------------------------------------------------------------------

EVEN = {"policy": exact.tables(TREE, 5)[0], "reward": jnp.zeros(3), "critic": jnp.zeros((TREE.num_states, 3))}
FIRSTS = {
    "best_of_n": lambda n, **at: decoding.best_of_n(tree.policy(TREE), weighted_tokens, num_samples=n, **at),
    "drop": lambda n, **at: decoding.best_of_n(
        tree.policy(TREE), weighted_tokens, num_samples=n, drop=((1, 3), (2, 2)) if n > 1 else (), **at
    ),
    "first_above": lambda n, **at: decoding.first_above(
        tree.policy(TREE), weighted_tokens, max_tries=n, chunk=min(n, 2), **at
    ),
    "blockwise": lambda n, **at: decoding.blockwise(
        tree.policy(TREE), tree.critic(TREE, "level"), num_samples=n, block_size=3, **at
    ),
}


@pytest.mark.parametrize("name", FIRSTS)
def test_the_first_among_equals_is_kept(name):
    """Where all scores are the same, the response of four draws is that of one."""
    names = {"blockwise": ("policy", "critic"), "first_above": ("policy", "reward", "reward_threshold")}
    params = {key: (EVEN | {"reward_threshold": 1.0})[key] for key in names.get(name, ("policy", "reward"))}
    prompts = exact.one_prompt(16)._replace(index=jnp.arange(16))
    given = {"params": params, "rng": jax.random.key(0), "prompts": prompts, "max_new_tokens": 3}
    one, four = (FIRSTS[name](n, **given).completions.tokens for n in (1, 4))
    np.testing.assert_array_equal(four, one)


# One set of samples, every n ------------------------------------------------------------------------------------------


def mean_over_subsets(reward: np.ndarray, value: np.ndarray, n: int) -> float:
    """The value of the best of every subset of n; ties split evenly."""
    out = []
    for subset in itertools.combinations(range(len(reward)), n):
        best = max(reward[i] for i in subset)
        out.append(np.mean([value[i] for i in subset if reward[i] == best]))
    return float(np.mean(out))


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_curve_is_the_mean_over_all_subsets(ties):
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 3, 7))
    if ties:
        reward = np.round(reward)
        assert all(len(np.unique(row)) < 7 for row in reward)
    curve = metrics.best_of_n_curve(reward, value=value)
    assert curve.shape == (3, 7)
    for b in range(3):
        for n in range(1, 8):
            assert curve[b, n - 1] == pytest.approx(mean_over_subsets(reward[b], value[b], n), abs=1e-12)
    np.testing.assert_allclose(curve[:, 0], value.mean(1))
    np.testing.assert_allclose(metrics.best_of_n_curve(reward)[:, -1], reward.max(1))
    np.testing.assert_allclose(metrics.best_of_n_curve(reward[0], value=value[0]), curve[0], rtol=1e-12)


def test_best_of_n_curve_is_unbiased_for_the_law_of_best_of_n():
    """4,000 sets of 8 samples of a tree with tied rewards: the mean curve of another value is E under
    `tree.best_of_n_law`, each n within 5 standard errors."""
    base, reward = exact.tables(TREE, 4)
    reward, other = np.round(np.asarray(reward) * 2), np.asarray(exact.tables(TREE, 5)[1], np.float64)
    log_base = tree.response_log_prob(TREE, base)
    law = np.exp(np.asarray(log_base, np.float64))
    drawn = np.random.default_rng(1).choice(len(law), size=(4000, 8), p=law / law.sum())
    curve = metrics.best_of_n_curve(reward[drawn], value=other[drawn])
    expected = [
        float(tree.expected(tree.best_of_n_law(log_base, score=reward, n=n), values=other)) for n in range(1, 9)
    ]
    assert_mean(curve, np.array(expected))
    assert np.ptp(expected) > 0.05


def test_best_of_n_curve_of_many_samples_and_of_forbidden_ones():
    x = np.random.default_rng(2).random(3000)
    curve = metrics.best_of_n_curve(x)
    assert (np.diff(curve) > 0).all()
    rank = np.sort(x)
    for n in (2, 50, 2999):
        weight = [math.comb(i, n - 1) / math.comb(3000, n) if i >= n - 1 else 0 for i in range(3000)]
        assert curve[n - 1] == pytest.approx(float(np.dot(weight, rank)), rel=1e-10)
    forbidden = metrics.best_of_n_curve(np.array([-np.inf, 1.0, -np.inf]), value=np.array([5.0, 1.0, 7.0]))
    np.testing.assert_allclose(forbidden, [13 / 3, (6 + 1 + 1) / 3, 1])
    for bad, match in (
        ({"reward": np.ones(3), "value": np.ones(2)}, "one shape"),
        ({"reward": np.ones(0)}, "at least 1"),
        ({"reward": np.array([np.nan])}, "NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            metrics.best_of_n_curve(**bad)


# Until a threshold ----------------------------------------------------------------------------------------------------


def above(*, count: int, tries: int, threshold, tables=None, chunk: int = 4):
    base, reward = exact.tables(TREE, 4) if tables is None else tables
    return decoding.first_above(
        tree.policy(TREE),
        tree.reward(TREE),
        {"policy": base, "reward": reward, "reward_threshold": threshold},
        jax.random.key(3),
        tree.prompts(count),
        max_tries=tries,
        chunk=chunk,
        max_new_tokens=3,
        eos_ids=(0,),
    )


def test_best_of_n_first_above_is_the_base_conditioned_on_the_threshold():
    """20,000 rows, chi-squared with at most 14 degrees of freedom below its 1 − 1e-6 quantile; the threshold is one of
    the rewards, which counts as reached. The share is unbiased and the tries are geometric."""
    base, reward = exact.tables(TREE, 4)
    threshold = float(np.sort(np.asarray(reward))[10])
    found = above(count=20_000, tries=400, threshold=threshold)
    assert found.info.accepted.all()
    law = np.exp(np.asarray(tree.response_log_prob(TREE, base), np.float64))
    kept = np.asarray(reward) >= threshold
    index = index_of(TREE, found.completions)
    assert kept[index].all()
    assert chi_square(index, np.where(kept, law, 0)) < 56
    assert_mean(found.info.accept_rate, law[kept].sum())
    assert_mean(found.info.tries, 1 / law[kept].sum())
    np.testing.assert_allclose(found.info.reward, np.asarray(reward)[index])
    kl = exact.kl(np.log(np.where(kept, law, 1e-300) / law[kept].sum()), np.log(law))
    assert kl == pytest.approx(-math.log(law[kept].sum()), rel=1e-5)


def test_best_of_n_first_above_falls_back_on_the_best_of_its_tries():
    """A threshold that nothing reaches: best-of-6 in its exact law, whatever the chunk; one per prompt where wanted."""
    base, reward = exact.tables(TREE, 4)
    found = above(count=20_000, tries=6, threshold=1e9)
    assert not found.info.accepted.any()
    np.testing.assert_array_equal(found.info.tries, 6)
    np.testing.assert_array_equal(found.info.accept_rate, 0)
    law = np.exp(tree.best_of_n_law(tree.response_log_prob(TREE, base), score=reward, n=6))
    assert chi_square(index_of(TREE, found.completions), law) < 56
    runs = [above(count=64, tries=6, threshold=0.8, chunk=c) for c in (1, 4, 6)]
    assert 0 < int(runs[0].info.accepted.sum()) < 64
    for other in runs[1:]:
        for name in ("accepted", "tries", "reward"):
            np.testing.assert_array_equal(getattr(other.info, name), getattr(runs[0].info, name))
        np.testing.assert_array_equal(other.completions.tokens, runs[0].completions.tokens)
    mixed = above(count=64, tries=6, threshold=jnp.where(jnp.arange(64) < 32, -1e9, 1e9))
    np.testing.assert_array_equal(mixed.info.accepted, np.arange(64) < 32)
    np.testing.assert_array_equal(mixed.info.tries[:32], 1)


def test_best_of_n_first_above_on_language_models_and_bad_requests():
    (lm, params), (judge, judge_params) = tiny_lm(0, num_layers=1), tiny_lm(1, "reward", num_layers=1)
    policy, reward, prompts = policies.language_model(lm), rewards.from_model(judge), padded(PROMPTS)

    def draw(reward=reward, arguments=None, **changes):
        given = {"policy": params, "reward": judge_params, "reward_threshold": 0.5, **(arguments or {})}
        settings = {"max_tries": 6, "chunk": 4, "max_new_tokens": 4, "eos_ids": EOS} | changes
        return decoding.first_above(policy, reward, given, jax.random.key(0), prompts, **settings)

    found = draw()
    np.testing.assert_array_equal(found.info.accepted, np.asarray(found.info.reward) >= 0.5)
    score = reward(judge_params, *decoding.join(prompts, found.completions), jnp.arange(5))
    np.testing.assert_allclose(found.info.reward, score, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="max_tries: expected at least 1, found 0"):
        draw(max_tries=0)
    with pytest.raises(ValueError, match="reward_threshold: expected numbers"):
        draw(arguments={"reward_threshold": float("nan")})
    with pytest.raises(ValueError, match=r"reward_threshold: expected a scalar or shape \(5,\)"):
        draw(arguments={"reward_threshold": jnp.ones(3)})
    broken = rewards.from_numpy(lambda t, m, p, i: np.where(i == 2, np.nan, 0.0))
    with pytest.raises(ValueError, match=r"reward: expected numbers, found NaN for prompts \[2\]"):
        draw(reward=broken, arguments={"reward": None})


# Samples that are dropped half-way ------------------------------------------------------------------------------------


def test_dropped_samples_leave_the_others_as_they_are():
    """Of 6 draws the best 4 by their first token and the best 2 by two go on; those are drawn as without dropping."""
    prompts, params = exact.one_prompt(5)._replace(index=jnp.arange(5)), {"reward": jnp.sin(jnp.arange(4.0))}
    params["policy"] = exact.tables(TREE, 3)[0]
    arguments = {"num_samples": 6, "max_new_tokens": 3}
    every = decoding.best_of_n(tree.policy(TREE), weighted_tokens, params, jax.random.key(4), prompts, **arguments)
    found = decoding.best_of_n(
        tree.policy(TREE), weighted_tokens, params, jax.random.key(4), prompts, drop=((1, 4), (2, 2)), **arguments
    )
    assert found.info.samples.tokens.shape == (5, 2, 3)
    samples = every.info.samples
    for row in range(5):
        left = list(range(6))
        for end, keep in ((1, 4), (2, 2)):
            part = jax.tree.map(lambda x, i=row: x[i], samples)
            part = part._replace(mask=part.mask & (jnp.arange(3) < end))
            six = jax.tree.map(lambda x, i=row: jnp.repeat(x[i : i + 1], 6, axis=0), prompts)
            score = np.asarray(weighted_tokens(params["reward"], *decoding.join(six, part), None))
            left = sorted(sorted(left, key=lambda j, score=score: -score[j])[:keep])
        for name in ("tokens", "mask", "log_prob", "kl", "finished"):
            expected = np.asarray(getattr(samples, name))[row, left]
            np.testing.assert_array_equal(np.asarray(getattr(found.info.samples, name))[row], expected, err_msg=name)
        best = left[int(np.argmax(np.asarray(every.info.reward)[row, left]))]
        np.testing.assert_array_equal(found.completions.tokens[row], samples.tokens[row, best])
    np.testing.assert_array_equal(found.kl.value, every.kl.value)


def test_what_dropping_refuses():
    params = {"policy": exact.tables(TREE, 3)[0], "reward": jnp.ones(4)}

    def drawn(reward=weighted_tokens, **given):
        given = {"num_samples": 4, "max_new_tokens": 3} | given
        return decoding.best_of_n(tree.policy(TREE), reward, params, jax.random.key(0), exact.one_prompt(2), **given)

    rising = "drop: expected tokens that rise below max_new_tokens = 3 and counts that fall below num_samples = 4"
    for drop, match in (
        (((3, 2),), rising),
        (((1, 4),), rising),
        (((2, 3), (1, 2)), rising),
        (((1, 2), (2, 2)), rising),
        (((0, 2),), "drop: tokens: expected at least 1, found 0"),
        (((1, 0),), "drop: samples kept: expected at least 1, found 0"),
        ((1, 2), r"drop: expected pairs \(tokens, samples kept\), found \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=match):
            drawn(drop=drop)
    with pytest.raises(ValueError, match="drop: expected all samples in one program, found chunk=2"):
        drawn(drop=((1, 2),), chunk=2)
    params["reward"] = jnp.ones(TREE.num_responses)  # a table of whole responses
    with pytest.raises(ValueError, match=r"reward: expected numbers for partial texts, found NaN for prompts \[0, 1\]"):
        drawn(tree.reward(TREE), drop=((1, 2),))

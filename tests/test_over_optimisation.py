"""The study of over-optimisation, on made-up tables: means over subsets, weights, and what it says of each curve."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from eval.studies import conformal, over_optimisation, proxies

CONFIG = over_optimisation.Config(samples=8, members=3)


def table(prompts=40, samples=8, members=3):
    """Gold and members that err alike, the more the higher they are."""
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(prompts, samples))
    proxy = gold + 0.8 * rng.normal(size=(members, prompts, samples))
    return proxies.Table(gold, proxy, np.abs(rng.normal(size=gold.shape)), (0.0, 1.0))


def test_shares_of_order_statistics_are_those_of_all_subsets():
    for n in (1, 3, 8):
        expected = np.zeros((8, n))
        for subset in itertools.combinations(range(8), n):
            expected[list(subset), range(n)] += 1 / math.comb(8, n)
        np.testing.assert_allclose(over_optimisation.order_shares(8, n), expected, atol=1e-12)


def test_the_curves_are_means_over_subsets():
    """Of the best and of the threshold over all subsets of two; of pessimism over all divisions, at the whole set."""
    given = table(prompts=3)
    curves = over_optimisation.Curves(CONFIG, given)
    pairs = list(itertools.combinations(range(8), 2))
    weight = np.exp(3.0) / (1 + np.exp(3.0))  # the higher of two is above the threshold
    for row in range(3):
        gold, proxy = given.gold[row], given.proxy[0, row]
        high = np.mean([gold[max(pair, key=lambda i, p=proxy: p[i])] for pair in pairs])
        low = np.mean([gold[min(pair, key=lambda i, p=proxy: p[i])] for pair in pairs])
        assert curves.best(given.proxy[0])[2]["gold"][row] == pytest.approx(high)
        assert curves.by_rank(3.0)[2]["gold"][row] == pytest.approx(weight * high + (1 - weight) * low)
        share = over_optimisation.pessimism(proxy, 0.5) / 8
        assert curves.pessimistic(0.5)[8]["gold"][row] == pytest.approx(share @ gold)
        assert curves.pessimistic(0.5)[1]["gold"][row] == pytest.approx(gold.mean())
    np.testing.assert_allclose(over_optimisation.pessimism(given.proxy[0], 0.5).mean(axis=1), 1)
    for found in (curves.by_rank(3.0), curves.pessimistic(0.5), curves.best(given.proxy[0])):
        for n in (1, 2, 4, 8):
            assert (found[n]["kl"] <= np.log(n) - (n - 1) / n + 1e-12).all()
    assert curves.by_rank(3.0)[8]["kl"][0] < np.log(8) - 7 / 8


def test_particles_are_weighted_by_the_reward():
    given = table(prompts=4)._replace(scale=(1.0, 2.0))
    found = over_optimisation.weighted(given, 0.5)
    weight = np.exp((1.0 + 2.0 * given.proxy[0]) / 0.5)  # in the member's own units; the mean cancels
    share = weight / weight.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found["gold"], (share * given.gold).sum(axis=1))
    np.testing.assert_allclose(found["kl"], (share * np.log(8 * share)).sum(axis=1))


def test_rows_say_what_each_curve_loses():
    rows, ends = over_optimisation.selections(CONFIG, "few", table())
    assert len(rows) == 5 * 4
    assert {row["method"] for row in rows} == {row["ends"] for row in ends} == set(list(over_optimisation.STYLES)[:5])
    for row in ends:
        mine = {r["n"]: r["gold"] for r in rows if r["method"] == row["ends"]}
        assert row["gold at best n"] == max(mine.values())
        assert row["lost"] == pytest.approx(max(mine.values()) - mine[8])
    plain, lower = (next(r for r in ends if r["ends"] == name) for name in ("best-of-n", "ensemble's lower bound"))
    assert plain["over best-of-n"] == 0
    assert plain["n of equal compute"] == 8
    assert lower["n of equal compute"] == 4


def test_novelty_is_a_distance_from_the_other_prompts_states():
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(6, 200, 5))
    hidden[4, 7] += 20
    found = proxies.novelty(hidden)
    assert found[4, 7] == found.max()
    assert np.delete(found.ravel(), 4 * 200 + 7).max() < 0.3 * found[4, 7]
    np.testing.assert_allclose((np.delete(found[1], 0) ** 2).mean(), 1, atol=0.2)  # the mean of chi-squared over D


def test_bad_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="samples: expected a power of 2, found 3"):
        over_optimisation.run(over_optimisation.Config(samples=3, out=str(tmp_path)))
    with pytest.raises(ValueError, match="run: expected the folder of a finished"):
        over_optimisation.run(over_optimisation.Config(run=str(tmp_path), out=str(tmp_path)))


def test_a_conformal_threshold_cuts_no_more_than_its_level(tmp_path):
    """Over 200 splits: at most a with ties, k/(n + 1) without, and the spread of the Beta law."""
    assert conformal.threshold(np.arange(99.0), 0.1) == 9
    assert conformal.threshold(np.arange(5.0), 0.1) == -np.inf
    rows = conformal.run(conformal.Config(out=str(tmp_path), sizes=(19, 99), levels=(0.1,), tested=300))
    for row in rows:
        assert row["share cut"] - row["share cut_95"] <= row["a"]
        if row["values"] == "without ties":
            assert abs(row["share cut"] - row["k/(n + 1)"]) < 2 * row["share cut_95"]
            assert row["deviation"] == pytest.approx(row["without ties"], rel=0.2)
    assert (tmp_path / "conformal.png").stat().st_size > 10_000

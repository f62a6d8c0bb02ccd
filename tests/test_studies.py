"""The studies of shaped rewards, small: what they claim holds row by row, and bad options are named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from eval.studies import __main__ as program
from eval.studies import base, bilevel, bound, language, noise, samples, tree, world


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy on 200 processes, few points per curve."""
    out = tmp_path_factory.mktemp("tree")
    return tree.run(tree.Config(out=str(out), betas=(2.0, 1.0), budgets=(0.1, 1.0))), out


def of(rows, **wanted):
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def test_toy_numbers(toy):
    """|V| = 3, T = 4, B = 2, beta 1: its utilities and KL, within the intervals of 200 other processes."""
    rows, out = toy
    expected = {
        "base": (0.667, 0.0),
        "threshold, exact follower": (1.469, 0.453),
        "threshold, exceedance head": (1.469, 0.453),
        "threshold, CD value head": (1.374, 0.371),
        "soft threshold, CD value head": (1.169, 0.125),
        "Minmax, CD value head": (1.062, 0.075),
        "raw, CD value head": (1.576, 0.421),
    }
    for name, (utility, kl) in expected.items():
        (row,) = of(rows, decoder=name)
        # Two estimates of one mean: their difference has an interval √2 times as wide; seven pairs are compared.
        assert abs(row["utility"] - utility) < 2 * row["utility_95"], name
        assert abs(row["kl"] - kl) < 0.03, name
    assert json.loads((out / "tree.json").read_text())["options"]["seeds"] == 200
    assert (out / "tree.png").stat().st_size > 10_000


def test_the_exceedance_head_is_the_exact_follower(toy):
    exact, head = (of(toy[0], decoder=f"threshold, {name}")[0] for name in ("exact follower", "exceedance head"))
    np.testing.assert_allclose([head["utility"], head["kl"]], [exact["utility"], exact["kl"]], rtol=1e-9)


def test_at_equal_kl_nothing_beats_the_raw_reward_and_at_equal_beta_the_threshold_does(toy):
    rows, _ = toy
    for row in of(rows, at="equal KL"):
        assert row["over_raw"] <= 1e-9, row
    for beta in (2.0, 1.0):
        wide = {row["shaping"]: row["utility_gain"] for row in of(rows, at="equal beta", bound=6.0, beta=beta)}
        assert wide["threshold"] == max(gain for name, gain in wide.items() if name != "optimum")
        assert wide["threshold"] <= wide["optimum"]
    narrow = {row["shaping"]: row["utility_gain"] for row in of(rows, at="equal beta", bound=2.0, beta=1.0)}
    assert narrow["threshold"] < narrow["raw"]  # a bound below the range of the utility caps what may be paid


def test_noise_light_tails_favour_the_raw_reward_and_heavy_ones_the_threshold(tmp_path):
    rows = noise.run(noise.Config(out=str(tmp_path), gains=(1.0, 3.0, 6.0), seeds=10))
    for gain in (1.0, 3.0):
        over = {row["error"]: row for row in of(rows, gain=gain, shaping="threshold")}
        assert over["Gaussian"]["over_raw"] + over["Gaussian"]["over_raw_95"] < 0
        assert over["Student t(2)"]["over_raw"] - over["Student t(2)"]["over_raw_95"] > 0
    assert all(row["over_raw"] == 0 for row in of(rows, shaping="raw"))
    # At a high gain the threshold follows the outliers; on the calibrated reward it does not.
    heavy = {row["shaping"]: row for row in of(rows, gain=6.0, error="Student t(2)")}
    ranked, plain = heavy["calibrated, threshold"], heavy["threshold"]
    assert ranked["gold_gain"] - ranked["gold_gain_95"] > plain["gold_gain"] + plain["gold_gain_95"]
    for row in rows:
        (budget,) = of(rows, error=row["error"], gain=row["gain"], shaping="threshold")
        assert row["kl"] <= budget["kl"] + 1e-3


def test_samples_numbers(tmp_path):
    """Ten samples of a Gaussian utility: .365 for .390, 1.08 for 1.19, 1.51 for 2.18 there, on samples of its own; in
    closed form the true ones are .397, 1.160 and 2.166."""
    rows = samples.run(samples.Config(out=str(tmp_path), sizes=(10, 64), prompts=2000))
    for gain, estimate, true in ((1.0, 0.365, 0.397), (3.0, 1.08, 1.160), (6.0, 1.51, 2.166)):
        (row,) = of(rows, gain=gain, n=10)
        assert abs(row["threshold"] - estimate) < 0.04
        assert row["true_threshold"] == pytest.approx(true, abs=2e-3)
        (more,) = of(rows, gain=gain, n=64)
        assert row["share_of_optimum"] < more["share_of_optimum"] <= 1


def test_bound_is_never_exceeded_and_attained(tmp_path):
    rows = bound.run(bound.Config(out=str(tmp_path), cases=500))
    assert [row["exceeding"] for row in rows if "exceeding" in row] == [0] * 3
    assert max(row.get("largest_share_of_bound", 0) for row in rows) == pytest.approx(1, abs=2e-3)


def test_followers_on_samples_are_compared_at_their_kl():
    """On samples whose reward is gold itself, nothing is ahead of the raw reward at equal KL."""
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(5, 64))
    found = base.Responses(gold, gold, np.zeros_like(gold), np.zeros_like(gold))
    rows = world.by_samples(world.Config(betas=(1.0,), budgets=(0.2, 1.0)), found)
    for row in of(rows, at="equal KL"):
        assert row["gold_over_raw"] <= 1e-5, row
        assert row["kl"] <= row["budget"] + 1e-5
        if row["shaping"] == "raw":
            assert row["kl"] == pytest.approx(row["budget"], abs=1e-5)
    error = {row["what"]: row["value"] for row in world.error_of(found)}
    assert error["correlation with gold"] == pytest.approx(1)


def test_each_follower_is_served_best_by_the_leader_that_climbed_through_it(tmp_path):
    sizes = {"processes": 4, "vocabulary": 2, "horizon": 3, "steps": 150}
    rows = bilevel.run(bilevel.Config(out=str(tmp_path), **sizes))
    names = ("closed form", "tokens", "trained")
    assert len(rows) == 10
    for follower in names:
        utility = {row["leader"]: row["utility"] for row in of(rows, follower=follower)}
        assert max(utility.values()) - utility[follower] < 0.02, utility
    (exact,) = of(rows, leader="closed form", follower="closed form")
    assert -1e-9 < exact["short_of_optimum"] < 0.02
    assert all(row["kl"] > 0 for row in rows[1:])
    assert (tmp_path / "bilevel.png").stat().st_size > 10_000


def test_predictions_of_the_closed_form_from_samples():
    utility = np.array([[1.0, 2.0]])
    found = base.Responses(utility, 2 * utility, np.array([[1.0, 0.0]]), np.zeros((1, 2)))
    got = language.predicted(jnp.log(jnp.array([[0.25, 0.75]])), found)
    np.testing.assert_allclose(got["utility"], [1.75])
    np.testing.assert_allclose(got["gold"], [3.5])
    np.testing.assert_allclose(got["loaded"], [0.25])
    np.testing.assert_allclose(got["kl"], [0.25 * np.log(0.5) + 0.75 * np.log(1.5)], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["tree", "--seeds", "0"], "seeds: expected"),
        (["noise", "--gains", "-1"], "gains: expected"),
        (["world", "--run", "nowhere"], "run: expected the folder of a finished train.quickstart"),
        (["language", "--run", "nowhere"], "run: expected the folder of a finished train.quickstart"),
        (["language", "--heads", "3", "--bound", "6"], "heads: expected 6.0"),
        (["tree", "--colour", "red"], "colour"),
        (["nothing"], "found 'nothing'"),
    ],
)
def test_bad_options_are_named(arguments, match, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:
        program.main([*arguments, "--out", str(tmp_path / "out")] if arguments[0] != "nothing" else arguments)
    assert match in capsys.readouterr().err + str(stop.value)
    assert not (tmp_path / "out").exists()

"""The study of InfAlign: what calibration from few samples costs, one beta for prompts of different scale."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from eval.studies import __main__ as program
from eval.studies import calibration

CONFIG = calibration.Options()

# Section 2.3; its own noise is given as about .006.
FINITE = {
    "exp:10, best of 4": (0.767, 0.805, 0.825, 0.845, 0.857, 0.863, 0.864),
    "identity, alone": (0.746, 0.761, 0.766, 0.770, 0.772, 0.773, 0.7735),
    "exp:-10, worst of 4": (0.883, 0.918, 0.930, 0.940, 0.944, 0.947, 0.947),
}


@pytest.fixture(scope="module")
def prompts():
    with jax.enable_x64(True):
        return calibration.random_prompts(CONFIG)


def test_infalign_T9_win_rates_from_tables_of_few_samples(prompts):
    with jax.enable_x64(True):
        rows = calibration.finite_tables(CONFIG, prompts)
    assert [row["samples K"] for row in rows] == ["4", "8", "16", "32", "100", "1000", "exact"]
    for goal, expected in FINITE.items():
        found = np.array([row[goal] for row in rows])
        # Two tables drawn apart: their difference has a deviation √2 times that of one; three of them.
        np.testing.assert_allclose(found, expected, atol=3 * np.sqrt(2) * 0.006 / 1.5)
        np.testing.assert_allclose(found[-2:], np.array(expected)[-2:], atol=4e-3)
        assert (np.diff(found) > 0).all()


def test_infalign_T12_with_one_beta_calibrated_rewards_win_at_equal_mean_kl(prompts):
    with jax.enable_x64(True):
        rows = calibration.equal_mean_kl(CONFIG, prompts)
    found = {row["reward at one beta"]: row for row in rows}
    assert all(row["mean KL"] == pytest.approx(0.5, abs=1e-9) for row in rows)
    rate = {name: row["win rate alone"] for name, row in found.items()}
    # The scales e^N(0,1) are drawn anew: the raw rewards' interval is the widest.
    assert rate["raw"] == pytest.approx(0.698, abs=1.5 * found["raw"]["win rate alone_95"])
    assert rate["z-score"] == pytest.approx(0.760, abs=3e-3)
    assert rate["calibrated"] == pytest.approx(0.7735, abs=3e-4)
    assert rate["calibrated"] > rate["z-score"] > rate["raw"]


def test_the_study_writes_its_tables_and_figure(tmp_path):
    small = ["--n", "2", "--kls", "0.5", "1.0", "--tables", "8", "--prompts", "10", "--outcomes", "16"]
    program.main(["--infalign", *small, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "infalign.json").read_text())["rows"]
    (row,) = [r for r in rows if r.get("win rate") == "best of N" and r["KL"] == "0.5"]
    assert row["optimum"] == pytest.approx(0.8156, abs=2e-4)
    assert row["its beta"] == pytest.approx(0.2340, abs=1e-4)
    (row,) = [r for r in rows if r.get("best |a| under") == "best of N" and r["KL"] == "0.5"]
    assert row["|a|"] == pytest.approx(4.6, abs=0.2)
    assert (tmp_path / "infalign.png").stat().st_size > 10_000


@pytest.mark.parametrize(("option", "match"), [(["--n", "0"], "n: expected"), (["--kls", "-1"], "kls: expected")])
def test_bad_options_are_named(option, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        program.main(["infalign", *option, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

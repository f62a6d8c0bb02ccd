"""train.shaping as a user runs it: leaders, the amortised threshold, shared roll-outs, bad input, devices."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign import models
from jaxalign.training import logging, rollouts
from tests.conftest import on_devices
from tests.test_train_scripts import files, options
from train import shaping, value

__all__ = ["files"]  # a fixture

RUN = ("--bound", "3", "--beta", "1", "--samples", "4", "--batch-size", "2", "--validation", "0.4", "--epochs", "2")
MODES = {
    "reward_model": ("--leader", "reward_model"),
    "tokens": ("--follower", "tokens", "--candidates", "4"),
    "smc": ("--follower", "smc", "--candidates", "4"),
    "trained": ("--follower", "trained"),
    "network": ("--leader", "network"),
    "amortise": ("--amortise",),
}


def command(folder: pathlib.Path, mode: str) -> list[str]:
    kept = options("value", folder)
    return [*kept, "--steps", "0", *RUN, *MODES[mode]]


@pytest.mark.parametrize("mode", MODES)
def test_each_leader_runs_in_bfloat16_and_reports_what_it_delivers_beside_the_optimum(mode, files, tmp_path, capsys):
    out = tmp_path / "run"
    once = [*command(files, mode), "--dtype", "bfloat16", "--out", str(out)]
    shaping.main(once)
    last = capsys.readouterr().out.splitlines()[-1]
    assert str(out) in last
    assert "next: " in last
    summary = json.loads((out / "summary.json").read_text())
    for name in ("leader", "base", "optimum"):
        assert np.isfinite(summary[f"utility_{name}"])
        assert summary[f"utility_{name}_95"] >= 0
    assert summary["utility_leader"] <= summary["utility_optimum"] + 1e-5
    assert summary["gain_over_optimum"] <= 1e-5
    if mode == "network":
        arrays = load_file(out / "network.safetensors")
        assert arrays
        assert all(np.isfinite(x).all() for x in arrays.values())
    else:
        lm, params = models.load(out / "model")
        assert lm.config.head == models.Head("reward", bound=None if mode == "amortise" else 3.0)
        assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    if mode != "amortise":
        assert 1 <= summary["effective_samples"] <= 4
    else:
        assert summary["threshold_error"] >= 0
    if mode in ("tokens", "smc"):
        assert np.isfinite([summary["follower_utility_before"], summary["follower_utility_after"]]).all()
        assert summary["follower_utility_gain_95"] >= 0
        assert min(summary["follower_kl_before"], summary["follower_kl_after"]) > 0
        assert summary["tokens_drawn"] > 0
        assert all(1 <= row["effective_samples"] <= 4.001 for row in logging.read(out / "metrics.jsonl"))
    # The same command finds the run whole.
    shaping.main(once)
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_trained_leader_delivers_more_on_its_training_prompts(files, tmp_path):
    """Rises on the roll-outs that it is trained on; held-out gains need more prompts than a test has."""
    shaping.main(
        [*command(files, "reward_model"), "--epochs", "60", "--learning-rate", "3e-3", "--out", str(tmp_path / "run")]
    )
    rows = logging.read(tmp_path / "run/metrics.jsonl")
    first, last = (np.mean([r["utility"] for r in part]) for part in (rows[:4], rows[-4:]))
    assert last > first + 0.05


def test_roll_outs_of_another_run_are_read_and_none_are_made(files, tmp_path, monkeypatch):
    base = [*options("value", files), "--samples", "4"]
    value.main([*base, "--out", str(tmp_path / "value")])
    monkeypatch.setattr(rollouts, "write_shard", None)  # would fail
    shared = ("--rollouts", str(tmp_path / "value"))
    head = [*base, *shared, "--objective", "exceedance", "--bound", "2", "--beta", "1", "--out", str(tmp_path / "head")]
    value.main(head)
    # Both commands again: the first writes its folder's config.json anew, which is no change to the second.
    value.main([*base, "--out", str(tmp_path / "value")])
    value.main(head)
    shaping.main([*command(files, "reward_model"), *shared, "--out", str(tmp_path / "leader")])
    assert not (tmp_path / "head/rollouts").exists()
    with pytest.raises(ValueError, match=r"rollouts: expected those of samples 2, found 4"):
        value.main([*options("value", files), *shared, "--out", str(tmp_path / "other")])
    (tmp_path / "value/rollouts/00001.npz").unlink()
    with pytest.raises(ValueError, match=r"rollouts: expected all 3 shards .* found none of \['00001.npz'\]"):
        value.main([*base, *shared, "--out", str(tmp_path / "short")])
    shutil.rmtree(tmp_path / "value")
    with pytest.raises(ValueError, match="rollouts: "):
        value.main([*base, *shared, "--out", str(tmp_path / "absent")])


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (("--bound", "0"), "bound: expected a finite value > 0"),
        (("--beta", "-1"), "beta: expected a finite value > 0"),
        (("--samples", "1"), "samples: expected at least 2"),
        (("--validation", "0"), "validation: "),
        (("--accumulate", "3"), "accumulate: "),
        (("--follower", "tokens", "--accumulate", "2"), "accumulate: expected 1 with --follower tokens"),
        (("--follower", "smc", "--leader", "network"), "follower: expected closed_form"),
        (("--follower", "trained", "--follower-step-size", "0"), "follower_step_size: expected"),
        (("--follower", "tokens", "--candidates", "0"), "candidates: expected at least 1"),
    ],
)
def test_bad_options_are_named(extra, match, files, tmp_path):
    with pytest.raises(ValueError, match=match):
        shaping.main([*command(files, "reward_model"), *extra, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/rollouts").exists()  # nothing is drawn before


def test_four_devices_and_accumulation_give_the_losses_of_one(files, tmp_path):
    one = [
        *command(files, "reward_model"),
        "--batch-size",
        "4",
        "--steps",
        "3",
        "--log-every",
        "1",
        "--validation",
        "0.3",
    ]
    shaping.main([*one, "--out", str(tmp_path / "one")])
    shaping.main([*one, "--accumulate", "2", "--out", str(tmp_path / "two")])
    four = [*one, "--mesh", "data=4", "--out", str(tmp_path / "four")]
    on_devices(f"from train import shaping; shaping.main({four!r})")
    runs = [logging.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two", "four")]
    assert len(runs[0]) == 3
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5, atol=1e-6)

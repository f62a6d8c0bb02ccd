"""train.calibrate and train.distil as a user runs them: tables of a base's samples, and what is distilled from them."""

from __future__ import annotations

import json
import os

import jax
import numpy as np
import pytest

from jaxalign import models
from jaxalign.data import preferences
from jaxalign.training import distillation, objectives, rollouts, tables
from tests.conftest import tiny_lm
from tests.test_train_rl import PROMPTS, K, files, options, table_options
from train import calibrate, distil, rl

__all__ = ["files"]  # a fixture


def test_a_table_holds_the_sorted_rewards_of_the_bases_samples_and_what_made_them(files, tmp_path):
    with np.load(files / "table/table.npz") as found:
        reward = found["reward"]
    assert reward.shape == (PROMPTS, K)
    assert (np.diff(reward, axis=1) >= 0).all()
    about = json.loads((files / "table/table.json").read_text())
    assert set(tables.MEANING) | {"samples", "seed"} == set(about)
    # A job that lost a shard goes on with it, to the same table; the order of work does not matter.
    calibrate.main([*table_options(files), "--out", str(tmp_path / "again")])
    (tmp_path / "again/summary.json").unlink()
    (tmp_path / "again/rollouts/00001.npz").unlink()
    calibrate.main([*table_options(files), "--out", str(tmp_path / "again")])
    with np.load(tmp_path / "again/table.npz") as found:
        np.testing.assert_array_equal(found["reward"], reward)


def test_a_single_sample_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="samples: expected at least 2"):
        calibrate.main([*table_options(files), "--samples", "1", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--max-new-tokens", "5"), "max_new_tokens"),
        (("--reward", "jaxalign.worlds.summaries:golds"), "reward"),
        (("--prompts", "other"), "prompts"),
        (("--model", "other"), "base"),
    ],
)
def test_a_table_made_with_anything_else_is_refused(files, tmp_path, change, named):
    name, value = change
    if name == "--prompts":
        path = tmp_path / "other.jsonl"
        path.write_text((files / "prompts.jsonl").read_text().splitlines()[0] + "\n" * 1)
        value = str(path)
    if name == "--model":
        lm, params = models.load(files / "base/model")
        value = str(tmp_path / "other")
        params["transformer"]["norm"] = jax.tree.map(lambda x: x + 1, params["transformer"]["norm"])
        models.save(value, lm, params, tokenizer=models.tokenizer(str(files / "base/model")))
    command = options(files, "--calibration", str(files / "table"), "--validation", "0", name, value)
    with pytest.raises(ValueError, match=f"calibration: expected a table of the same {named}"):
        rl.main([*command, "--out", str(tmp_path / "run")])


def test_roll_outs_of_files_that_have_changed_since_are_refused(files, tmp_path):
    same = [*table_options(files), "--rollouts", str(files / "table"), "--out", str(tmp_path / "same")]
    calibrate.main(same)
    assert {"config.json", "inputs.json", "versions.json"} < {path.name for path in (tmp_path / "same").iterdir()}
    calibrate.main(same)  # it is reported
    prompts = files / "prompts.jsonl"
    kept, text = prompts.stat(), prompts.read_bytes()
    os.utime(prompts, ns=(kept.st_atime_ns, kept.st_mtime_ns + 10**9))  # touched alone: the bytes are the same
    calibrate.main([*table_options(files), "--rollouts", str(files / "table"), "--out", str(tmp_path / "touched")])
    prompts.write_bytes(text + b"\n")
    try:
        with pytest.raises(ValueError, match="rollouts: expected those of the files as they are now"):
            calibrate.main([*table_options(files), "--rollouts", str(files / "table"), "--out", str(tmp_path / "new")])
    finally:
        prompts.write_bytes(text)
        os.utime(prompts, ns=(kept.st_atime_ns, kept.st_mtime_ns))


@pytest.mark.parametrize("loss", ["bonbon", "sft"])
def test_best_of_n_is_distilled_from_the_tables_samples(loss, files, tmp_path):
    short = (
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--max-length",
        "64",
        "--validation",
        "0.3",
        "--learning-rate",
        "1e-3",
    )
    command = ["--model", str(files / "base/model"), "--calibration", str(files / "table"), "--n", "2", *short]
    distil.main([*command, "--loss", loss, "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["wanted_margin"] == 1.0
    assert 0 < summary["pairs"] <= PROMPTS * K / 2
    assert models.load(tmp_path / "run/model")[0].config.head is None


def test_bonbon_is_the_likelihood_of_the_best_and_ipo_at_its_margin():
    """By hand from the log-likelihoods of a tiny model and of its reference, best and worst told apart."""
    (lm, params), (_, reference) = tiny_lm(0), tiny_lm(1)
    rows = [rollouts.Rollout([4, 5], [6, 7, 0], 1.0, 0), rollouts.Rollout([4, 5], [8, 0], 0.0, 0)]
    (pair,) = distillation.best_and_worst(rows, 2)
    batch = preferences.pad_pairs([pair], length=8)
    found, _ = distillation.bonbon(lm, n=2, sft_weight=0.25)(params, batch, reference)
    best, worst, best_ref, worst_ref = (
        float(objectives.log_likelihoods(lm, p, batch[side])[0]) for p in (params, reference) for side in batch
    )
    ipo = ((best - best_ref) - (worst - worst_ref) - distillation.best_of_n_margin(2)) ** 2
    assert float(found) == pytest.approx(0.75 * ipo - 0.25 * best, rel=1e-5)
    assert pair.chosen == [6, 7, 0]


def test_the_margin_of_distillation_is_that_of_the_best_of_n_policy():
    """E of (n−1)·(log max − log min) of n uniforms, by 400,000 draws: the standard error is below 0.3 %."""
    for n in (2, 4, 8):
        c = np.random.default_rng(n).random((400_000, n))
        drawn = (n - 1) * (np.log(c.max(axis=1)) - np.log(c.min(axis=1)))
        assert abs(drawn.mean() - distillation.best_of_n_margin(n)) < 4 * drawn.std() / np.sqrt(len(c))
    assert distillation.best_of_n_margin(4) == pytest.approx(5.5)


def test_distillation_keeps_the_best_and_the_worst_of_each_group_and_refuses_another_base(files, tmp_path):
    found = [rollouts.Rollout([1], [i], float(r), 0) for i, r in enumerate((3, 1, 2, 5, 5, 5))]
    kept = list(distillation.best_and_worst(found, 3))
    assert [(pair.chosen, pair.rejected) for pair in kept] == [([0], [1])]
    lm, params = models.load(files / "base/model")
    params["transformer"]["norm"] = jax.tree.map(lambda x: x + 1, params["transformer"]["norm"])
    models.save(tmp_path / "other", lm, params, tokenizer=models.tokenizer(str(files / "base/model")))
    given = ["--calibration", str(files / "table"), "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="model: expected the base that"):
        distil.main(["--model", str(tmp_path / "other"), *given])
    with pytest.raises(ValueError, match="n: expected at most the table's 4"):
        distil.main(["--model", str(files / "base/model"), "--n", "5", *given])

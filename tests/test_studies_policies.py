"""What the studies of trained policies and of GGRO compute: cases whose answers are known, and one small run."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from eval.studies import common, nudging, predictions, trained
from jaxalign import decoding, tree
from tests import exact
from train import reward_model, sft, world


def test_every_token_is_tried_once_by_the_exhaustive_search():
    """One segment on a tree: the best over the first tokens of what greedy decoding makes of each."""
    t = tree.Tree(4, 3, eos_id=0)
    log_policy, reward = exact.tables(t, 2)
    found = decoding.ggro(
        tree.policy(t),
        tree.reward(t),
        nudging.next_of_all,
        {"policy": log_policy, "reward": reward, "gradient": None, "entropy_threshold": np.inf},
        jax.random.key(0),
        exact.one_prompt(1),
        num_samples=5,
        top_k=4,
        max_new_tokens=3,
        eos_ids=(0,),
    )
    assert int(found.info.reward_passes[0]) == 4
    tokens, mask = t.responses
    table, nodes = np.asarray(log_policy), t.nodes
    greedy = table.argmax(axis=1)
    follows = [
        all(int(tokens[i, j]) == greedy[nodes[i, j]] for j in range(1, 3) if mask[i, j]) for i in range(len(tokens))
    ]
    # An end is text like any other here: the reward reads a response without its EOS where that names one.
    best = max(float(reward[i]) for i in range(len(tokens)) if follows[i])
    np.testing.assert_allclose(found.info.reward[0], best, rtol=1e-5)


def test_passes_count_the_prompt_once_and_gradients_twice_more():
    made = decoding.GGROInfo(*([None] * len(decoding.GGROInfo._fields)))
    found = made._replace(policy_steps=np.array([10.0]), reward_passes=np.array([4.0]), gradient_passes=np.array([2.0]))
    np.testing.assert_allclose(nudging.nudging_passes(found, np.array([3])), [10 * 3 + 3])


def test_policies_are_compared_by_all_subsets():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 16))
    drawn = trained.Drawn(base + 1, base, np.full((50, 16), 0.5))
    each = trained.compared(drawn, trained.Drawn(base, base, np.zeros((50, 16))), trained.Config(n=4))
    found = trained.summary({}, each)
    wins = (base[:, :, None] + 1 > base[:, None, :]).mean()
    np.testing.assert_allclose([found["win_rate"], found["kl"], found["gold_win_rate"]], [wins, 0.5, 0.5])
    assert found["best_of_n"] > found["win_rate"]
    with jax.enable_x64(True):
        curve = predictions.closed_form("identity", np.array([0.5, 1.0]), 4)[1]
    np.testing.assert_allclose(curve.win_rate, [0.7737, 0.8646], atol=2e-4)


def test_policies_are_held_against_the_curve_at_their_own_kl_with_the_error_of_both():
    rng = np.random.default_rng(0)
    kl = 0.5 + 0.1 * rng.standard_normal(400)
    kl += 0.5 - kl.mean()
    # On the curve but for noise of its own: W = .7117 at KL .5 under exp:10, its slope from the curve.
    with jax.enable_x64(True):
        near = predictions.closed_form("exp:10", np.array([0.49, 0.51]), 4)[1].win_rate
    slope = float(near[1] - near[0]) / 0.02
    noise = 0.02 * rng.standard_normal(400)
    win = 0.7 + slope * (kl - 0.5) + noise
    found = predictions.at_its_kl("exp:10", {"kl": kl, "win_rate": win, "best_of_n": win, "worst_of_n": win}, 4)
    assert found["predicted_win_rate"] == pytest.approx(0.7117, abs=2e-4)
    assert found["predicted_best_of_n"] == pytest.approx(0.8715, abs=3e-4)
    assert found["short_of_win_rate"] == pytest.approx(0.7117 - win.mean(), abs=2e-4)
    # What the KL explains is no error of the distance.
    assert found["short_of_win_rate_95"] == pytest.approx(1.96 * noise.std() / 20, rel=0.02)
    far = dict.fromkeys(("kl", "win_rate", "best_of_n", "worst_of_n"), np.full(3, 50.0))
    for name in ("exp:10", "bon_fp:4"):
        assert predictions.at_its_kl(name, far, 4)["predicted_win_rate"] is None


def test_rewards_without_calibration_are_trained_at_the_beta_of_their_mean_kl():
    """Gaussian rewards: the KL of the tilt is about (sigma/beta)²/2 for a small one."""
    reward = np.random.default_rng(1).standard_normal((100, 2000))
    assert predictions.beta_for(reward, 0.02) == pytest.approx(5.0, rel=0.02)
    assert predictions.beta_for(3 * reward, 0.02) == pytest.approx(15.0, rel=0.02)


def test_closed_forms_are_at_the_wanted_kl_and_the_fixed_point_is_ahead_of_every_other():
    kl = np.array([0.25, 0.5])
    with jax.enable_x64(True):
        found = {text: predictions.closed_form(text, kl, 4)[1] for text in ("identity", "exp:10", "bon_fp:4")}
    for curve in found.values():
        np.testing.assert_allclose(curve.kl, kl, rtol=1e-4)
    # The optimum under best of 4.
    np.testing.assert_allclose(found["bon_fp:4"].best_of_n, [0.797, 0.873], atol=6e-4)
    for text in ("identity", "exp:10"):
        assert (found["bon_fp:4"].best_of_n >= found[text].best_of_n).all()


def test_calibrated_rewards_among_the_shapings_read_ranks_alone():
    utility = np.random.default_rng(2).standard_normal((3, 16))
    shapes = common.shapes(2.0, 1.0, sharpness=1.0)
    for name in (*common.CALIBRATED, "calibrated, threshold"):
        found = np.asarray(shapes[name](utility, utility))
        assert found.min() >= 0
        assert found.max() <= 2
        np.testing.assert_allclose(shapes[name](np.exp(3 * utility), np.exp(3 * utility)), found, err_msg=name)
    assert not np.allclose(shapes["PAR"](3 * utility, 3 * utility), shapes["PAR"](utility, utility))


def test_the_study_of_trained_policies_runs_to_its_table_and_picture(tmp_path):
    """Too small to learn: what is asked is that every kind of policy is trained, drawn from and reported."""
    run = tmp_path / "run"
    sizes = ("--texts", "64", "--pairs", "32", "--held-out", "4", "--layers", "1", "--width", "16")
    world.main(["--out", str(run / "data"), *sizes])
    data = run / "data"
    rows = (data / "prompts.jsonl").read_text().splitlines()
    (data / "prompts.jsonl").write_text("\n".join(rows[:8]) + "\n")
    new = ("--architecture", str(data / "config.json"), "--tokenizer", str(data / "tokenizer"))
    short = ("--steps", "2", "--batch-size", "8", "--max-length", "64")
    sft.main(["--data", str(data / "texts.jsonl"), *new, *short, "--out", str(run / "sft")])
    start = ("--model", str(run / "sft/model"), "--data", str(data / "pairs.jsonl"))
    reward_model.main([*start, *short, "--out", str(run / "reward_model")])
    out = tmp_path / "out"
    options = {
        "kls": "0.5",
        "ablation": "raw",
        "table": "8",
        "n": "2",
        "responses": "4",
        "steps": "1",
        "samples": "2",
        "limit": "6",
        "regress": "reverse steps=2 refresh=2",
        "regress-steps": "1",
        "regress-batch": "4",
        "on-training": "4",
    }
    command = [text for name, value in options.items() for text in (f"--{name}", value)]
    command += ["--transforms", "identity", "won_fp:2", "--prompts-per-step", "2", "--run", str(run), "--out", str(out)]
    trained.main(command)
    found = json.loads((out / "trained.json").read_text())["rows"]
    assert [row["reward"] for row in found] == [
        *("identity", "won_fp:2", "vbon", "raw"),
        *(f"{text}, reverse steps=2 refresh=2" for text in ("identity", "won_fp:2")),
        *("dpo", "ipo", "bonbon"),
    ]
    assert all(row["drawn"] > 0 for row in found[4:6])
    for row in found:
        assert row["kl"] >= 0
        assert 0 <= row["win_rate"] <= 1
        assert 0 <= row["train_win_rate"] <= 1
        assert ("predicted_win_rate" in row) == (row["reward"] != "raw")
    assert (out / "trained.png").stat().st_size > 10_000
    # Again, with fewer baselines: what is trained is kept.
    times = {path: path.stat().st_mtime_ns for path in run.glob("trained/*/model/*")}
    trained.main([*command, "--baselines", "dpo"])
    assert [row["reward"] for row in json.loads((out / "trained.json").read_text())["rows"]] == [
        "identity",
        "won_fp:2",
        "raw",
        *(f"{text}, reverse steps=2 refresh=2" for text in ("identity", "won_fp:2")),
        "dpo",
    ]
    assert times == {path: path.stat().st_mtime_ns for path in run.glob("trained/*/model/*")}
    with pytest.raises(ValueError, match="baselines: expected some of dpo, ipo, bonbon, vbon, found 'ppo'"):
        trained.main([*command, "--baselines", "ppo"])
    with pytest.raises(ValueError, match="n: expected at least 2, found 1"):
        trained.main([*command, "--n", "1"])
    for name in ("cubic", "reverse steps", "reverse steps=0", "reverse batch=2", "steps=2"):
        with pytest.raises(ValueError, match=f"regress: expected one of reverse, .*, found '{name}'"):
            trained.main([*command, "--regress", name])
    with pytest.raises(ValueError, match="kls: expected KLs that won_fp:2 reaches"):
        trained.main([*command, "--kls", "12"])

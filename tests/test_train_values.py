"""Training scripts of value models, DPO and adapters: what their short runs learn and write."""

from __future__ import annotations

import json

import chex
import jax
import numpy as np
import pytest

from jaxalign import decoding, models, policies
from jaxalign.prompts import prompt_batch
from jaxalign.training import logging, states
from jaxalign.worlds import opinions
from tests.conftest import tiny_lm
from tests.test_train_scripts import SHORT, files, options
from train import dpo, reward_model, tokenizer, value

__all__ = ["files"]  # a fixture


@pytest.mark.parametrize("objective", ["cd_q", "td", "pairs", "soft", "exceedance"])
def test_every_value_objective_trains_a_head_that_says_what_it_is(objective, files, tmp_path):
    head = "q" if objective in ("cd_q", "exceedance") else "scalar"
    command = [*options("value", files), "--objective", objective, "--head", head, "--head-size", "8"]
    follower = None
    if objective in ("soft", "exceedance"):
        command += ["--bound", "3", "--beta", "0.5"]
        follower = models.Follower(objective, beta=0.5, bound=3.0)
    value.main([*command, "--out", str(tmp_path / "run")])
    lm, _ = models.load(tmp_path / "run/model")
    assert lm.config.head == models.Head("q" if head == "q" else "value", hidden_size=8, follower=follower)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert ("threshold" in summary) == (follower is not None)
    logged = logging.read(tmp_path / "run/metrics.jsonl")
    assert all(("clipped" in row) == (objective == "soft") for row in logged)
    assert all(0 <= row.get("clipped", 0) <= 1 for row in logged)


@pytest.mark.parametrize("objective", ["cd_q", "fudge"])
def test_a_q_head_learns_from_responses_that_others_wrote(objective, files, tmp_path):
    """Rows of a file, the base's or not: scored as whole texts, no roll-outs made, the run resumable."""
    path = tmp_path / "responses.jsonl"
    rows = [row | {"method": "other"} for row in opinions.corpus(12, seed=1, prompt_pool=opinions.prompts()[:6])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = options("value", files)
    at = given.index("--prompts")
    given[at : at + 2] = ["--responses", str(path)]
    command = [*given, "--objective", objective, "--head", "q", "--out", str(tmp_path / "run")]
    value.main(command)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["rollouts"] == 12
    golds = opinions.golds([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert summary["reward"] == pytest.approx(np.mean(golds), abs=1e-5)
    assert not (tmp_path / "run/rollouts").exists()
    with pytest.raises(ValueError, match="prompts: expected either --prompts or --responses, found both"):
        value.main([*command, "--prompts", str(files / "prompts.jsonl")])
    with pytest.raises(ValueError, match="bound: expected --prompts"):
        value.main([*command, "--bound", "1", "--beta", "1"])
    path.write_text(json.dumps({"text": "no prompt here"}) + "\n")
    with pytest.raises(ValueError, match=r'responses\.jsonl:1: expected a "prompt"'):
        value.main([*command[:-1], str(tmp_path / "other")])


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_dpo_moves_away_from_its_reference_and_prefers_what_was_chosen(loss, files, tmp_path):
    command = [
        *options("dpo", files),
        "--loss",
        loss,
        "--steps",
        "12",
        "--learning-rate",
        "0.01",
        "--validation",
        "0.4",
    ]
    dpo.main([*command, "--out", str(tmp_path / "run")])
    rows = logging.read(tmp_path / "run/metrics.jsonl")
    at_reference = np.log(2) if loss == "dpo" else 25.0  # (0 − 1/(2·0.1))²
    np.testing.assert_allclose(rows[0]["loss"], at_reference, rtol=1e-5)
    assert rows[0]["margin"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["margin"] > 0
    assert rows[-1]["accuracy"] > 0.5
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 <= summary["pair_accuracy"] <= 1
    assert np.isfinite(summary["margin"])
    assert summary["margin"] != 0


def test_transcripts_in_the_form_of_hh_train_a_reward_model_and_bad_lines_are_counted(files, tmp_path):
    rows = opinions.transcripts(opinions.preferences(24, seed=3))
    lines = [json.dumps(row) for row in rows]
    lines.insert(5, json.dumps({"chosen": "no turn at all", "rejected": "none here"}))
    path = tmp_path / "hh.jsonl"
    path.write_text("\n".join(lines) + "\n")
    tokenizer.main(["--data", str(path), "--skip-bad", "--vocab-size", "300", "--out", str(tmp_path / "tokens")])
    new = ("--architecture", str(files / "world/config.json"), "--tokenizer", str(tmp_path / "tokens"))
    command = ["--data", str(path), *new, *SHORT, "--max-length", "128", "--validation", "0.3"]
    with pytest.raises(ValueError, match=r"hh\.jsonl:6: "):
        reward_model.main([*command, "--out", str(tmp_path / "strict")])
    assert not (tmp_path / "strict/model").exists()
    reward_model.main([*command, "--skip-bad", "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["skipped_rows"] == 1
    assert summary["rows"] + summary["validation_rows"] == 24
    assert 0 <= summary["pair_accuracy"] <= 1
    assert summary["pair_accuracy_95"] > 0


def test_head_of_another_kind_is_replaced_and_a_classifier_is_no_language_model():
    lm, params = tiny_lm(0)
    new, found = states.replace_head(lm, params, models.Head("reward"), jax.random.key(0))
    assert new.config.head == models.Head("reward")
    body = {name: leaf for name, leaf in params["transformer"].items() if name != "lm_head"}
    chex.assert_trees_all_equal(found["transformer"], body)
    with pytest.raises(ValueError, match="expected a language model"):
        states.replace_head(new, found, None, jax.random.key(0))


def test_laws_on_a_frozen_body_are_the_same_from_stored_states(files, tmp_path, capsys):
    head = ("--objective", "distribution", "--frozen", "--head-size", "12", "--bins", "7", "--validation", "0")
    found = {}
    for name, extra in (("stored", ()), ("online", ("--no-store-states",))):
        value.main([*options("value", files), *head, *extra, "--out", str(tmp_path / name)])
        found[name] = models.load(tmp_path / name / "model")[1]
    assert f"--method distribution:{tmp_path / 'online' / 'model'}:soft@1" in capsys.readouterr().out
    assert (tmp_path / "stored/states/00000.npy").exists()
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)  # noqa: E731
    jax.tree.map(same, found["stored"]["head"], found["online"]["head"])
    base = models.load(files / "base/model")[1]
    chex.assert_trees_all_equal(found["stored"]["transformer"], base["transformer"])


def test_a_frozen_body_stays_and_its_value_head_is_for_editing(files, tmp_path, capsys):
    head = ("--objective", "td", "--frozen", "--activation", "relu", "--head-layers", "2", "--head-size", "12")
    value.main([*options("value", files), *head, "--weight-decay", "0.1", "--out", str(tmp_path / "out")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "next: python -m eval.decode" in last
    assert f"--method re_control:{tmp_path / 'out' / 'model'}@1" in last
    lm, params = models.load(tmp_path / "out/model")
    value.main(
        [*options("value", files), *head, "--weight-decay", "0.1", "--no-store-states", "--out", str(tmp_path / "at")]
    )
    online = models.load(tmp_path / "at/model")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), params["head"], online["head"])
    assert (tmp_path / "out/states/00000.npy").exists()
    assert not (tmp_path / "at/states").exists()
    base, base_params = models.load(files / "base/model")
    chex.assert_trees_all_equal(params["transformer"], base_params["transformer"])
    assert lm.config.head == models.Head("value", hidden_size=12, num_hidden=2, activation="relu")
    edited = policies.re_control(policies.language_model(base), base.logits, policies.head_value(lm), num_steps=2)
    given = {"policy": base_params, "value": params, "step_size": 1e5}  # weights of two steps are small
    prompts = prompt_batch([[5, 6], [7]])
    drawn = decoding.sample(edited, given, jax.random.key(0), prompts, max_new_tokens=2, eos_ids=())
    assert float(drawn.kl.sum()) > 1e-4
    for extra, match in (
        (("--head", "q"), "head: expected scalar with --frozen"),
        (("--objective", "soft", "--beta", "1"), "objective: expected fudge, td, pairs or distribution"),
        (("--model", str(tmp_path / "out/model")), "model: expected the base with --frozen"),
        (("--head-layers", "0"), "head_layers: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            value.main([*options("value", files), *head, *extra, "--out", str(tmp_path / "bad")])

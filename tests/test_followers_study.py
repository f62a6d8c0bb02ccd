"""eval.studies followers at a tiny size: the leaders' commands, and what each follower delivers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from eval.studies import followers
from jaxalign import commands, models
from jaxalign.training import shaping_data
from train import sft, world


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with data/ and sft/ of a tiny world."""
    folder = tmp_path_factory.mktemp("run")
    sizes = ("--texts", "64", "--pairs", "8", "--held-out", "6", "--layers", "1", "--width", "16")
    world.main(["--out", str(folder / "data"), *sizes])
    data = folder / "data"
    made = ("--data", str(data / "texts.jsonl"), "--architecture", str(data / "config.json"))
    short = ("--steps", "2", "--batch-size", "8", "--max-length", "64", "--track", "none")
    sft.main([*made, "--tokenizer", str(data / "tokenizer"), *short, "--out", str(folder / "sft")])
    return folder


def config(run, out) -> followers.Config:
    return followers.Config(
        out=str(out), run=str(run), prompts=4, samples=3, steps=1, batch=2, candidates=2, follower_steps=2
    )


def test_three_leaders_are_trained_alike_on_the_same_roll_outs(run, tmp_path, monkeypatch):
    seen: list[Any] = []
    module = commands.load("shaping")
    monkeypatch.setattr(module, "run", lambda config: seen.append(config))
    given = config(run, tmp_path)
    assert followers.world(given) == run  # nothing is made anew
    folders = followers.train(given, run)
    assert [one.shaping.follower for one in seen] == list(folders) == ["closed_form", "tokens", "trained"]
    assert len((run / "followers/prompts.jsonl").read_text().splitlines()) == 4
    assert json.loads((run / "followers/config.json").read_text())["num_hidden_layers"] == 1
    first, *others = seen
    assert first.rollouts.rollouts == ""
    for one in others:
        assert one.rollouts.rollouts == first.run.out
        assert (one.shaping.bound, one.rollouts.samples, one.optimizer.steps) == (3.0, 3, 1)
    for one in seen:
        shaping_data.check_shaping_options(one.shaping, one.rollouts)
        assert models.config_from_hf(json.loads((run / "followers/config.json").read_text())) is not None


def test_each_leader_is_answered_by_three_followers(run, tmp_path, monkeypatch):
    base = models.load(run / "sft/model")
    head = models.Head("reward", bound=3.0)
    lm = models.with_head(base[0], head)
    params = {"transformer": base[1]["transformer"]} | {"head": lm.init_head(followers.jax.random.key(1))}
    models.save(tmp_path / "leader", lm, params, tokenizer=models.tokenizer(run / "sft/model"))
    monkeypatch.setattr(followers, "train", lambda config, run: dict.fromkeys(followers.NAMES, tmp_path / "leader"))
    rows = followers.run(config(run, tmp_path / "out"))
    assert [(row["leader"], row["follower"]) for row in rows[:4]] == [
        ("none", "base"),
        *(("closed_form", name) for name in followers.NAMES),
    ]
    assert len(rows) == 10
    for row in rows[1:]:
        # The two that weigh the base's own samples are paired with it; the other draws its own.
        gain = row["utility"] - rows[0]["utility"]
        assert row["gain"] == pytest.approx(gain, abs=1e-5)
        assert -1e-6 <= row["kl"] <= (np.log(3) if row["follower"] != "tokens" else 40 * np.log(237))
        assert row["utility_95"] > 0
    # One leader stands for all three here: its rows are equal.
    assert rows[1:4] == [dict(row, leader="closed_form") for row in rows[4:7]]
    assert (tmp_path / "out/followers.png").stat().st_size > 5_000
    written = json.loads((tmp_path / "out/followers.json").read_text())
    assert len(written["rows"]) == 10

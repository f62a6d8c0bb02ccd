"""The study of a real model that leans to one side, on a made run of three words' feelings."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eval.studies import reviews
from jaxalign.data import tokenizers

WORDS = ["great", "good", "fine", "table", "a", "the", "bad", "awful", "terrible", "nice", "wrong", "ugly"]
ASKED = ("Write a short review of a lamp.", "What do you think of rain?", "Plan a walk.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three prompts, eight and four samples each; two words in three are friendly or neutral."""
    out = tmp_path_factory.mktemp("run")
    tokenizer = tokenizers.word_level(WORDS)
    tokenizer.save_pretrained(out / "base")
    (out / "data").mkdir()
    lines = [{"messages": [{"role": "user", "content": text}]} for text in ASKED]
    (out / "data" / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rng = np.random.default_rng(0)
    for stage, samples in (("preferences", 8), ("laws", 4)):
        (out / stage / "rollouts").mkdir(parents=True)
        texts = [" ".join(rng.choice(WORDS, 5, replace=False)) for _ in range(3 * samples)]
        tokens = np.array([tokenizer(text).input_ids[:5] for text in texts])
        rows = {"index": np.repeat(np.arange(3), samples), "tokens": tokens, "length": np.full(3 * samples, 5)}
        np.savez(out / stage / "rollouts" / "00000.npz", **rows)
    return out


def test_the_threshold_serves_the_user_best_at_one_beta_and_the_raw_reward_at_one_kl(made, tmp_path):
    options = {"run": str(made), "out": str(tmp_path), "betas": (1.0, 0.5), "budgets": (0.1, 0.5), "draws": 200}
    rows = reviews.run(reviews.Config(**options))
    pool = reviews.read_pool(str(made))
    assert pool.gold.shape == (3, 12)
    (start,) = (row for row in rows if row.get("at") == "base")
    asked = pool.take(np.array([0, 1]))
    assert start["positive"] == pytest.approx((asked.compound > 0.05).mean())
    assert start["utility"] == pytest.approx((asked.gold - 2 * asked.compound).mean())
    for beta in (1.0, 0.5):
        mine = {row["shaping"]: row for row in rows if row.get("beta") == beta}
        assert all(row["utility"] > start["utility"] and row["positive"] < start["positive"] for row in mine.values())
        assert mine["threshold"]["utility"] == max(row["utility"] for row in mine.values())
    for kl in (0.1, 0.5):
        mine = {row["shaping"]: row for row in rows if row.get("at") == "equal KL" and row["budget"] == kl}
        assert mine["raw"]["utility"] >= max(row["utility"] for row in mine.values()) - 1e-9
        identity, exponential = (row for row in rows if row.get("at") == "best of 4" and row["budget"] == kl)
        assert identity["kl"] == pytest.approx(kl, abs=1e-6)
        assert exponential["reward"] > identity["reward"] > identity["alone"] - 0.1
        assert exponential["alone"] < identity["alone"]  # each is the better for its own aim
        assert exponential["reward_over_first_low"] <= exponential["reward_over_first"]
    assert (tmp_path / "reviews.png").stat().st_size > 10_000


def test_a_run_without_samples_is_named(made, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.jsonl").write_text((made / "data" / "prompts.jsonl").read_text())
    (tmp_path / "base").symlink_to(made / "base")
    with pytest.raises(ValueError, match=r"run: expected the roll-outs of preferences in .*, found none"):
        reviews.read_pool(str(tmp_path))

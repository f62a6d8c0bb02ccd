"""The world of real text: its prompts, its two utilities against their packages' own scores, its noisy readers."""

from __future__ import annotations

import importlib.util
import json
import math
import re

import numpy as np
import pytest

from jaxalign.worlds import sentiment
from train import world

KIND = "The staff were kind. The breakfast was a delight."
PLAIN = "The train leaves at nine. It has six cars."
ANGRY = "It was awful. I hate the noise."


def test_prompts_are_distinct_sentences_and_splits_share_none():
    train, held_out = sentiment.prompts(), sentiment.prompts("held_out")
    assert (len(train), len(held_out)) == (160, 40)
    assert len(set(train + held_out)) == 200
    assert all(re.fullmatch(r"[A-Z][^.?]*[.?]", prompt) for prompt in train + held_out)
    with pytest.raises(ValueError, match=r"split: expected 'train' or 'held_out', found 'test'"):
        sentiment.prompts("test")


def test_compound_is_the_mean_of_the_packages_scores_of_sentences():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    score = SentimentIntensityAnalyzer().polarity_scores
    parts = [score(part)["compound"] for part in ("The staff were kind.", "The breakfast was a delight.")]
    assert sentiment.compound(KIND) == pytest.approx(sum(parts) / 2)
    assert sentiment.compound(KIND.replace(". ", ".\n\n")) == pytest.approx(sum(parts) / 2)
    assert sentiment.compound(ANGRY) < -0.3 < sentiment.compound(PLAIN) == 0 < 0.3 < sentiment.compound(KIND)
    assert sentiment.compound("") == sentiment.compound(" ...\n") == 0


def test_the_second_lexicon_scores_sums_as_the_first_does():
    from afinn import Afinn

    total = Afinn().score("It was awful.")
    assert sentiment.compound("It was awful.", "afinn") == pytest.approx(total / math.sqrt(total**2 + 15))
    assert sentiment.second_gold("", ANGRY) < sentiment.second_gold("", PLAIN) < sentiment.second_gold("", KIND)


def test_repeated_runs_and_empty_answers_cost():
    assert sentiment.repetition("good good good good good") == pytest.approx(1 - 1 / 3)
    assert sentiment.repetition(KIND) == sentiment.repetition("two words") == 0
    praise = "I love this lovely place. "
    assert sentiment.gold("", praise * 6) < sentiment.gold("", praise)
    assert sentiment.gold("", "Lovely!") == pytest.approx(sentiment.compound("Lovely!") - 1)
    assert sentiment.gold("", "") == -1
    assert sentiment.golds(["a", "b"], [KIND, ANGRY]) == [sentiment.gold("a", KIND), sentiment.gold("b", ANGRY)]
    assert sentiment.second_golds(["a"], [KIND]) == [sentiment.second_gold("a", KIND)]


def test_the_everyday_task_writes_chats_of_disjoint_requests(tmp_path):
    world.run(world.Config(out=str(tmp_path / "world"), task="everyday", prompts=12, held_out=5))
    assert sorted(path.name for path in (tmp_path / "world").iterdir()) == ["held_out.jsonl", "prompts.jsonl"]
    asked = {}
    for name, count in (("prompts", 12), ("held_out", 5)):
        rows = [json.loads(line) for line in (tmp_path / "world" / f"{name}.jsonl").read_text().splitlines()]
        assert [[m["role"] for m in row["messages"]] for row in rows] == [["system", "user"]] * count
        asked[name] = {row["messages"][1]["content"] for row in rows}
        assert len(asked[name]) == count
    assert not asked["prompts"] & asked["held_out"]
    for more, match in (
        ({"held_out": 41}, "held_out: expected at most 40 requests, found 41"),
        ({"texts": 3}, "texts: expected none for --task everyday, found 3"),
    ):
        with pytest.raises(ValueError, match=match):
            world.run(world.Config(out=str(tmp_path / "other"), task="everyday", **more))
    with pytest.raises(ValueError, match="prompts: expected none for --task opinions, found 3"):
        world.run(world.Config(out=str(tmp_path / "other"), prompts=3))


def test_preferences_follow_the_stated_probability():
    """5,000 draws: a share more than 4 standard deviations from sigmoid(gap / noise) has probability 6e-5."""
    gap, n = 0.3, 5_000
    samples = {f"p{i}": ["good day", "bad day"] for i in range(n)}
    rows = sentiment.preferences(samples, seed=0, noise=0.5, utility=lambda _, r: gap if r == "good day" else 0.0)
    share = np.mean([row["chosen"] == "good day" for row in rows])
    exact = 1 / (1 + math.exp(-gap / 0.5))
    assert len(rows) == n
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / n)


def test_preferences_are_between_neighbours_that_differ():
    rows = sentiment.preferences({"p": ["a", "a ", "b", "c", "d"]}, seed=0, utility=lambda *_: 0.0)
    assert [{row["chosen"], row["rejected"]} for row in rows] == [{"b", "c"}]
    with pytest.raises(ValueError, match="noise: expected a positive number, found 0"):
        sentiment.preferences({}, seed=0, noise=0)


def test_a_lexicon_that_is_not_there_is_named(monkeypatch):
    sentiment._scorer.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"expected the package afinn \(pip install 'jaxalign\[real\]'\), found none"):
        sentiment.compound("Hi", "afinn")
    with pytest.raises(ValueError, match="lexicon: expected 'vader' or 'afinn', found 'other'"):
        sentiment.compound("Hi", "other")
    sentiment._scorer.cache_clear()

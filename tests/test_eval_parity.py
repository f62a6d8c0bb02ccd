"""eval.parity: what is compared, what is found, and what is said without torch."""

from __future__ import annotations

import importlib.util

import jax
import numpy as np
import pytest

from eval import parity as command
from jaxalign import models
from jaxalign.data import tokenizers
from jaxalign.evaluation import parity
from tests.models.make_golden import GOLDEN

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="live comparison needs torch")


def without_torch(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else found(name, *rest)
    )


def test_without_torch_one_line_says_what_is_needed(monkeypatch, capsys):
    without_torch(monkeypatch)
    with pytest.raises(
        ValueError, match=r"^torch: expected for transformers' own forward \(pip install torch\), found"
    ):
        command.main(["--model", "nowhere"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("match", "changes"),
    [("rows", {"rows": 0}), ("tolerance", {"tolerance": 0.0}), ("tolerance", {"tolerance": np.nan})],
)
def test_options_are_checked(match, changes):
    with pytest.raises(ValueError, match=f"^{match}: expected"):
        command.run(command.Config(model="nowhere", **changes))


def test_rows_are_padded_on_either_side_and_lengths_differ():
    assert parity.padded([[1, 2, 3], [4]], "left", 9) == ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])
    assert parity.padded([[1, 2, 3], [4]], "right", 9) == ([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])
    rows = parity.random_rows(50, 4, 16, 0)
    assert [len(row) for row in rows] == [16, 14, 12, 10]
    assert 0 <= min(map(min, rows)) < max(map(max, rows)) < 50
    assert rows == parity.random_rows(50, 4, 16, 0) != parity.random_rows(50, 4, 16, 1)


def test_a_difference_is_that_of_real_positions():
    theirs = np.zeros((2, 2, 3), np.float32)
    theirs[0, 0], theirs[1, 1] = (1.0, 2.0, -4.0), (0.0, 0.0, 1.0)
    ours = theirs.copy()
    ours[0, 0, 0] += 1.5  # the most probable token is another
    ours[0, 1] = 100.0  # padding
    mask = np.array([[True, False], [True, True]])
    found = parity.difference("rows", "logits", ours, theirs, mask)
    assert found == parity.Difference("rows", "logits", 1.5, 4.0, pytest.approx(2 / 3))
    assert found.relative == pytest.approx(0.375)
    with pytest.raises(ValueError, match=r"logits of rows: expected shape \(2, 2, 3\)"):
        parity.difference("rows", "logits", ours[:, :, :2], theirs, mask)


@needs_torch
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gemma2_reward", "mistral_reward"])
def test_a_folder_agrees(name, capsys):
    found = command.run(command.Config(model=str(GOLDEN / name), length=24))
    assert [each.tokens for each in found] == ["random, left-padded", "random, right-padded"]
    assert {each.kind for each in found} == {"rewards" if name.endswith("reward") else "logits"}
    assert all(each.scale > 0.1 and each.relative < 2e-4 for each in found)
    assert "agrees with transformers" in capsys.readouterr().out


@needs_torch
def test_texts_are_read_and_another_model_is_found(tmp_path, monkeypatch):
    lm, params = models.load(GOLDEN / "llama")
    models.save(tmp_path / "model", lm, params, tokenizer=tokenizers.word_level(["the", "cat", "sat"]))
    config = command.Config(model=str(tmp_path / "model"), length=8, texts=("the cat", "the cat sat the cat"))
    assert [each.tokens for each in command.run(config)][2:] == ["'the cat'", "'the cat sat the cat'"]
    other = jax.tree.map(lambda x: x * 1.01, params)
    monkeypatch.setattr(models, "load", lambda path: (lm, other))
    with pytest.raises(ValueError, match=r"parity: expected differences of at most 0\.0002 .* found"):
        command.run(config)
    with pytest.raises(ValueError, match="length: expected 1 to the model's 64 tokens, found 65"):
        parity.run(str(tmp_path / "model"), length=65)

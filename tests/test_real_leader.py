"""train.shaping on a chat model: an adapter leads, the model's own tokens follow, a program of texts is the utility."""

from __future__ import annotations

import json

import chex
import numpy as np
import pytest

from jaxalign import models
from jaxalign.training import logging
from train import shaping, smollm2, world


def program(prompts: list[str], responses: list[str]) -> list[float]:
    """A gold that needs no package: the share of letters of an alphabet's first half."""
    del prompts
    return [sum(c in "abcdefghijklm" for c in text) / max(len(text), 1) for text in responses]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    smollm2.main(["--out", str(root / "base"), "--toy"])
    world.main(["--task", "everyday", "--prompts", "8", "--held-out", "2", "--out", str(root / "data")])
    return root


def command(folder, *more: str) -> list[str]:
    given = {
        "--base": folder / "base",
        "--prompts": folder / "data/prompts.jsonl",
        "--reward": "tests.test_real_leader:program",
        "--follower": "tokens",
        "--candidates": 4,
        "--samples": 2,
        "--max-new-tokens": 4,
        "--max-length": 128,
        "--validation": 0.3,
        "--batch-size": 2,
        "--steps": 2,
        "--log-every": 1,
        "--lora-rank": 2,
        "--learning-rate": 1e-2,
    }
    return [str(part) for pair in given.items() for part in pair] + list(more)


def test_an_adapter_leads_and_the_summary_tells_what_it_delivers_and_costs(folder, tmp_path, capsys):
    out = tmp_path / "leader"
    shaping.main([*command(folder, "--compare-raw"), "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    for name in ("utility_before", "utility_raw", "utility_after", "utility_gain", "utility_gain_over_base"):
        assert np.isfinite(summary[f"follower_{name}"])
        assert summary[f"follower_{name}_95"] >= 0
    found = {name: summary[f"follower_utility_{name}"] for name in ("before", "raw", "after")}
    assert summary["follower_utility_gain"] == pytest.approx(found["after"] - found["before"])
    assert summary["follower_utility_gain_over_raw"] == pytest.approx(found["after"] - found["raw"])
    assert summary["follower_utility_gain_over_base"] == pytest.approx(found["after"] - summary["utility_base"])
    # Four of all tokens are left: that alone is a KL. The leader pays differently once it has learned.
    assert summary["follower_kl_before"] > 0.1
    assert summary["follower_kl_after"] != summary["follower_kl_before"]
    assert summary["training_steps"] == 2
    assert 2 * 2 * 2 <= summary["tokens_drawn"] <= 2 * 2 * 2 * 4
    assert summary["candidates_read"] == 4 * summary["tokens_drawn"]
    assert summary["training_seconds"] > 0
    assert summary["trained_parameters"] < summary["parameters"] / 10
    assert [row["step"] for row in logging.read(out / "metrics.jsonl")] == [1, 2]
    assert all(row["kl"] > 0 for row in logging.read(out / "metrics.jsonl"))
    lm, params = models.load(out / "model")
    base = models.load(folder / "base")[1]
    assert lm.config.head == models.Head("reward", bound=3.0)
    kernel = lambda tree: np.asarray(tree["transformer"]["layer_0"]["attention"]["qkv"]["kernel"])  # noqa: E731
    assert 0 < np.abs(kernel(params) - kernel(base)).max() < 1
    np.testing.assert_array_equal(params["transformer"]["embedding"], base["transformer"]["embedding"])
    adapted_lm, adapted = models.load(out / "adapter")  # which knows the bound, too
    assert adapted_lm.config.head == lm.config.head
    chex.assert_trees_all_close(adapted, params, rtol=1e-5, atol=1e-6)
    assert f"wrote {out / 'model'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (("--lora-rank", "0", "--lora-alpha", "4"), "lora_alpha: expected with --lora-rank"),
        (("--follower", "closed_form", "--leader", "network"), "lora_rank: expected 0 for a leader that is no"),
        (("--follower", "closed_form", "--amortise"), "lora_rank: expected 0 for a leader that is no"),
        (
            ("--follower", "trained", "--compare-raw"),
            "compare_raw: expected with --follower tokens or smc, found trained",
        ),
    ],
)
def test_bad_options_are_named(extra, match, folder, tmp_path):
    with pytest.raises(ValueError, match=match):
        shaping.main([*command(folder), *extra, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run/model").exists()

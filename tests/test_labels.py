"""Preference pairs between a model's own samples: the stated probability, ends that a limit cut, what is left out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from jaxalign import data
from jaxalign.training import labels
from jaxalign.training.rollouts import Rollout
from train import preferences as command
from train import smollm2, world

END = 0


class Letters:
    """A tokenizer of letters by number."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(" abcdefgh"[i] for i in ids if i != END)


def pairs(responses, sources=("p",), **more):
    found = [Rollout([9], list(ids), reward, row) for row, ids, reward in responses]
    return labels.noisy_pairs(found, sources, Letters(), (END,), **({"noise": 0.5, "seed": 0} | more))


def test_the_better_response_is_chosen_with_the_stated_probability():
    """5,000 draws: a share more than 4 standard deviations from sigmoid(gap / noise) has probability 6e-5."""
    n, gap = 5_000, 0.3
    rows, found = pairs([(i, ids, r) for i in range(n) for ids, r in (([1], gap), ([2], 0.0))], ["p"] * n)
    share = np.mean([row["chosen"] == "a" for row in rows])
    exact = 1 / (1 + math.exp(-gap / 0.5))
    assert found["pairs"] == len(rows) == n
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / n)
    assert found["better_chosen"] == pytest.approx(share)


def test_pairs_are_of_neighbours_and_say_which_side_was_cut():
    samples = [(0, [1, END], 90.0), (0, [2, 3], 0.0), (0, [END], 1.0), (0, [3], 1.0), (0, [4], 0.0), (0, [4, END], 1.0)]
    rows, found = pairs(samples, [[{"role": "user", "content": "Hi"}]])
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": "a",
            "rejected": "bc",
            "chosen_truncated": False,
            "rejected_truncated": True,
        }
    ]
    assert (found["empty_pairs"], found["same_pairs"], found["truncated"]) == (1, 1, 0.5)
    with pytest.raises(ValueError, match="samples: expected pairs of different texts, found 1 with an empty one, 1 of"):
        pairs(samples[2:])


def test_a_pair_that_is_left_out_does_not_change_the_others():
    rest = [(1, [i], float(i % 3)) for i in range(1, 9)]
    whole = pairs([(0, [1], 0.0), (0, [2], 0.1), *rest], ["p", "q"])[0]
    left = pairs([(0, [END], 0.0), (0, [2], 0.1), *rest], ["p", "q"])[0]
    assert whole[1:] == left


def test_the_command_writes_pairs_of_the_models_samples_and_is_done_once(tmp_path, capsys):
    smollm2.run(smollm2.Config(out=str(tmp_path / "base"), toy=True))
    world.run(world.Config(out=str(tmp_path / "world"), task="everyday", prompts=3, held_out=1))
    program = "jaxalign.worlds.sentiment:golds"
    words = ["--base", str(tmp_path / "base"), "--prompts", str(tmp_path / "world/prompts.jsonl"), "--reward", program]
    words += ["--samples", "4", "--max-new-tokens", "4", "--out", str(tmp_path / "pairs")]
    command.main(words)
    found = data.read_pairs(tmp_path / "pairs/pairs.jsonl").rows
    assert len(found) == json.loads((tmp_path / "pairs/summary.json").read_text())["pairs"] <= 6
    assert found[0].prompt[0]["content"] == "Answer in one short sentence."
    written = (tmp_path / "pairs/pairs.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    command.main(words)
    assert (tmp_path / "pairs/pairs.jsonl").stat().st_mtime_ns == written
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"wrote {tmp_path / 'pairs' / 'pairs.jsonl'} and ")
    for more, match in ((("--noise", "0"), "noise: "), (("--samples", "1"), "samples: expected at least 2")):
        with pytest.raises(ValueError, match=match):
            command.main([*words, *more])

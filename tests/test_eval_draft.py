"""eval.decode --draft: the same responses faster, and refusals of methods that gain nothing."""

from __future__ import annotations

import json
import pathlib

import pytest

from eval import decode
from jaxalign import models
from tests.conftest import tiny_lm
from tests.test_eval_decode import tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for seed, (name, head) in enumerate({"base": None, "arm": None, "small": None, "scalar": "value"}.items()):
        models.save(root / name, *tiny_lm(seed, head, num_layers=1), tokenizer=tokenizer())
    (root / "prompts.txt").write_text("the cat\na dog ran on the mat\nthe dog and the cat sat\n")
    return {name: str(root / name) for name in ("base", "arm", "small", "scalar", "prompts.txt")}


def command(folders, out, *extra: str) -> list[str]:
    given = ["--model", folders["base"], "--prompts", folders["prompts.txt"], "--out", str(out)]
    return [*given, "--max-new-tokens", "5", "--batch-size", "3", *extra]


def read(out) -> list[dict]:
    files = sorted(pathlib.Path(out).glob("*/responses.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_greedy_responses_are_those_without_a_draft(folders, tmp_path):
    methods = ("--method", f"genarm:{folders['arm']}@0.7", "--temperature", "0")
    draft = ("--draft", folders["small"], "--draft-tokens", "2")
    decode.main(command(folders, tmp_path / "plain", *methods))
    decode.main(command(folders, tmp_path / "fast", *methods, "--inspect", "1", *draft))
    assert (tmp_path / "fast" / "base" / "tokens.jsonl").exists()  # --inspect
    plain, fast = read(tmp_path / "plain"), read(tmp_path / "fast")
    assert [r["method"] for r in plain] == ["base"] * 3 + [f"genarm:{folders['arm']}"] * 3
    for one, other in zip(plain, fast, strict=True):
        assert one["tokens"] == other["tokens"]
        assert other["kl"] == pytest.approx(one["kl"], abs=1e-4)
        assert other["info"]["drafted"] >= other["info"]["accepted"]
        assert other["info"]["rounds"] >= 1
        passes = other["info"]["rounds"] * 3 * (3 if other["method"] != "base" else 2)
        assert other["forwards"] == pytest.approx(passes / len(other["tokens"]), abs=1e-3)


def test_the_base_drafts_for_its_tilt_and_is_itself_drawn_plainly(folders, tmp_path):
    decode.main(command(folders, tmp_path, "--method", f"genarm:{folders['arm']}@2", "--draft", "below"))
    records = read(tmp_path)
    assert ["rounds" in r.get("info", {}) for r in records] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("--method", "value:{scalar}@1", "--draft", "{small}"),
            "draft: expected critics that score every token at once",
        ),
        (
            ("--method", "cards@1", "--draft", "{small}", "--reward", "m:f"),
            "draft: expected methods that sample from one",
        ),
        (("--method", "policy:{arm}", "--draft", "below"), "draft: expected a folder for policy"),
        (("--draft", "below", "--temperature", "0.5"), "draft: expected a folder beside --temperature"),
        (("--draft", "{scalar}"), "draft: expected a language model, found a model with a value head"),
        (("--draft", "{small}", "--stream"), "stream: expected no --draft"),
        (("--draft", "{small}", "--draft-tokens", "0"), "draft_tokens: expected at least 1, found 0"),
    ],
)
def test_what_gains_nothing_is_refused_by_name(folders, tmp_path, extra, message):
    named = [text.format(**folders) for text in extra]
    with pytest.raises(ValueError, match=message):
        decode.main(command(folders, tmp_path / "out", *named))
    assert not (tmp_path / "out" / "results.json").exists()

"""eval.decode --inspect and --stream: what is written of each token, and what is printed while it is drawn."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from eval import decode
from jaxalign import models
from jaxalign.evaluation import streaming
from jaxalign.evaluation.report import write_report
from tests.conftest import tiny_lm
from tests.test_eval_decode import arguments, methods, read, tokenizer
from tests.test_report import Page

COUNT = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for seed, (name, head) in enumerate({"base": None, "reward": "reward", "arm": None}.items()):
        models.save(root / name, *tiny_lm(seed, head, num_layers=1), tokenizer=tokenizer())
    (root / "prompts.txt").write_text("the cat\na dog ran on the mat\nthe dog and the cat sat\nsat\nthe mat\n")
    return {name: str(root / name) for name in ("base", "reward", "arm", "prompts.txt")}


def words(folders, out, *extra: str) -> list[str]:
    named = (f"genarm:{folders['arm']}@0.5", "best_of_n@2")
    given = [*methods(*named), "--reward", folders["reward"], "--temperature", "0.7"]
    return arguments(folders, out, *given, "--top-k", "6", *extra)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("run") / "out"
    decode.main(words(folders, out, "--inspect", str(COUNT)))
    return out


def inspected(out: pathlib.Path) -> list[tuple[dict, dict]]:
    """(record, line of tokens.jsonl) of each response that was looked at."""
    lines = {
        (line["method"], line["beta"], line["index"]): line
        for path in sorted(out.glob("*/tokens.jsonl"))
        for line in map(json.loads, path.read_text().splitlines())
    }
    return [(r, lines.pop((r["method"], r["beta"], r["index"]))) for r in read(out) if r["index"] < COUNT]


def test_each_token_has_the_numbers_of_its_response(finished):
    found = inspected(finished)
    assert len(found) == 3 * COUNT
    for record, line in found:
        pieces, selected = line["pieces"], record["method"] == "best_of_2"
        assert "".join(piece["text"] for piece in pieces) == tokenizer().decode(record["tokens"])
        assert [piece["special"] for piece in pieces] == [token == 0 for token in record["tokens"]]
        np.testing.assert_allclose([piece["log_prob_ref"] for piece in pieces], record["log_prob_ref"], atol=2e-5)
        np.testing.assert_allclose(pieces[-1]["reward"], record["reward"], atol=2e-5)
        for piece in pieces:
            assert piece["text"] in [candidate[0] for candidate in piece["candidates"]]
        if selected:
            assert {piece[name] for piece in pieces for name in ("log_prob", "kl", "q")} == {None}
            continue
        np.testing.assert_allclose([piece["log_prob"] for piece in pieces], record["log_prob"], atol=2e-5)
        np.testing.assert_allclose(sum(piece["kl"] for piece in pieces), record["kl"], atol=5e-5)
        tilted = record["method"].startswith("genarm")
        assert all((piece["q"] is not None) == tilted for piece in pieces)
        counts = {6} if tilted else {8, 9}  # the likeliest, and the one drawn where it is none of them
        assert {len(piece["candidates"]) for piece in pieces} <= counts
        if tilted:  # the whole support of the tilt
            for piece in pieces:
                mass = np.exp([log_prob for _, log_prob, _, _ in piece["candidates"]]).sum()
                np.testing.assert_allclose(mass, 1, atol=1e-4)
                weight = np.exp([ref for _, _, ref, _ in piece["candidates"]])
                assert abs(weight @ [q for *_, q in piece["candidates"]]) < 1e-4


def test_q_is_the_critics_score(finished, folders):
    """Differences between candidates are those of the autoregressive reward model's log-probabilities, whatever the
    temperature."""
    lm, params = models.load(folders["arm"])
    log_softmax = jax.jit(lambda p, tokens, mask: jax.nn.log_softmax(lm.apply(p, tokens, mask=mask).logits[0]))
    vocabulary = {f" {word}": i for word, i in tokenizer().get_vocab().items()}
    checked = 0
    for record, line in inspected(finished):
        if not record["method"].startswith("genarm"):
            continue
        prompt = tokenizer()(record["prompt"])["input_ids"]
        text = prompt + record["tokens"]
        tokens, mask = np.zeros((1, 16), np.int32), np.zeros((1, 16), bool)
        tokens[0, : len(text)], mask[0, : len(text)] = text, True
        scores = np.asarray(log_softmax(params, tokens, mask))
        for t, piece in enumerate(line["pieces"][1:], start=1):  # the first has no space before it
            expected = [scores[len(prompt) + t - 1, vocabulary[text]] for text, *_ in piece["candidates"]]
            q = [q for *_, q in piece["candidates"]]
            np.testing.assert_allclose(np.subtract(q, q[0]), np.subtract(expected, expected[0]), atol=1e-3)
            checked += 1
    assert checked > 3


def test_the_reward_of_a_token_is_that_of_the_text_so_far(finished, folders):
    lm, params = models.load(folders["reward"])
    score = jax.jit(lambda p, tokens, mask: lm.apply(p, tokens, mask=mask).head[0, :, 0])
    for record, line in inspected(finished):
        prompt = tokenizer()(record["prompt"])["input_ids"]
        text = prompt + record["tokens"]
        tokens, mask = np.zeros((1, 16), np.int32), np.zeros((1, 16), bool)
        tokens[0, : len(text)], mask[0, : len(text)] = text, True
        expected = np.asarray(score(params, tokens, mask))[len(prompt) - 1 : len(text)]
        given = [line["reward_before"], *(piece["reward"] for piece in line["pieces"])]
        np.testing.assert_allclose(given, expected, atol=2e-5)


def test_what_is_there_is_kept_and_more_is_added(finished, folders, tmp_path):
    page = tmp_path / "page.html"
    assert write_report([finished], page) == []
    data = Page(page).data
    assert len(data["tokens"]) == 3 * COUNT
    assert all(line["before"] is not None and line["tokens"] for line in data["tokens"])
    path = finished / "base/tokens.jsonl"
    before = path.stat().st_mtime_ns
    decode.main(words(folders, finished, "--inspect", str(COUNT - 1)))
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"^inspect: expected at least 0 prompts, found -1"):
        decode.main(words(folders, tmp_path / "out", "--inspect", "-1"))
    assert not (tmp_path / "out").exists()


def test_streamed_responses_are_the_same_and_are_printed_in_order(finished, folders, tmp_path, capsys):
    decode.main(words(folders, tmp_path / "out", "--stream"))
    printed = capsys.readouterr().out
    for path in finished.glob("*/responses.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        again = (tmp_path / "out" / path.parent.name / "responses.jsonl").read_text().splitlines()
        for record, other in zip(records, map(json.loads, again), strict=True):
            assert record["tokens"] == other["tokens"]
            assert record["kl"] == pytest.approx(other["kl"], abs=2e-5)
            name = record["method"] + ("" if record["beta"] is None else f" at {record['beta']:g}")
            assert printed.count(f"\n[{name}] {record['prompt']}\n> {record['response']}\n") == 1
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["tokens_per_second"] for row in rows} == {None}


def test_texts_that_grow_at_once_are_shown_one_after_another():
    shown: list[str] = []
    page = streaming.Page(["a: ", "b: ", "c: "], shown.append)
    page.add(1, "x")
    page.add(0, "1")
    assert shown == ["a: ", "1"]
    page.end([2])
    page.add(0, "2")
    page.end([0])
    assert "".join(shown) == "a: 12\nb: x"
    page.end([1])
    assert "".join(shown) == "a: 12\nb: x\nc: \n"

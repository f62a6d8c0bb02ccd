"""Rows as token ids within a length: what is kept where a row is cut, what is counted, what is refused."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from jaxalign import tokens
from jaxalign.data import encoded, preferences
from tests import token_cases as cases

USER = {"role": "user", "content": "one two three four five six seven eight nine ten"}
SYSTEM = {"role": "system", "content": "Yes, No."}
REPLY = {"role": "assistant", "content": "I am fine."}


class Pair(NamedTuple):
    prompt: Any
    chosen: Any
    rejected: Any
    where: str = "f:1"
    truncated: tuple[bool, bool] = (False, False)


class Example(NamedTuple):
    prompt: Any
    response: Any
    where: str = "f:1"
    truncated: bool = False


class PromptRow(NamedTuple):
    prompt: Any
    where: str = "f:1"


def form_of(template=cases.CHATML, make=cases.byte_level, **options):
    return tokens.text_format(make(template, **options))


def text(form, ids):
    return form.tokenizer.decode(ids)


def test_a_response_that_a_limit_cut_has_no_end(tmp_path):
    form = form_of()
    pair = {"prompt": [USER], "chosen": "I am fine.", "rejected": "Yes"}
    file = tmp_path / "pairs.jsonl"
    for sides in ((True, False), (False, True), (True, True)):
        more = {"chosen_truncated": sides[0], "rejected_truncated": sides[1]}
        file.write_text(json.dumps(pair | more))
        row = preferences.tokenize_pairs(file, form, max_length=200, tail=True).rows[0]
        assert text(form, row.chosen) == "I am fine." + ("" if sides[0] else "<|im_end|>\n")
        assert text(form, row.rejected) == "Yes" + ("" if sides[1] else "<|im_end|>\n")
        found = preferences.tokenize_texts(file, form, max_length=200)
        assert text(form, found.rows[0].response) == "I am fine." + ("" if sides[0] else "<|im_end|>")
        assert bool(found.taught) != sides[0]
    file.write_text(json.dumps(pair | {"rejected_truncated": "yes"}))
    with pytest.raises(ValueError, match="jsonl:1: expected true or false in rejected_truncated, found 'yes'"):
        preferences.tokenize_pairs(file, form, max_length=200)


def test_a_sample_that_a_limit_cut_has_no_end(tmp_path):
    """A response of its own row, as eval.decode writes them, learned as a text or in pairs by score."""
    form = form_of()
    rows = [
        {"prompt": [USER], "response": "I am fine.", "truncated": True, "reward": 2.0},
        {"prompt": [USER], "response": "Yes", "truncated": False, "reward": 1.0},
    ]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut, ended = preferences.tokenize_texts(file, form, max_length=200).rows
    assert text(form, cut.response) == "I am fine."
    assert text(form, ended.response) == "Yes<|im_end|>"
    (pair,) = preferences.tokenize_pairs(file, form, max_length=200, score="reward").rows
    assert text(form, pair.chosen) == "I am fine."
    assert text(form, pair.rejected) == "Yes<|im_end|>"
    file.write_text(json.dumps(rows[0] | {"truncated": "no"}))
    with pytest.raises(ValueError, match="jsonl:1: expected true or false in truncated, found 'no'"):
        preferences.tokenize_texts(file, form, max_length=200)


def test_pairs_share_a_prompt_and_say_what_ends_them():
    form = form_of()
    rows = [Pair([USER], "I am fine.", [{"role": "assistant", "content": "Yes"}]), Pair("hello", " there", " you")]
    found = encoded.encode_pairs(rows, form, max_length=200)
    chat, plain = found.rows
    assert text(form, chat.chosen) == "I am fine.<|im_end|>"
    assert text(form, chat.rejected) == "Yes<|im_end|>"
    assert chat.prompt == tokens.encode_prompt(form, [USER]).ids
    assert text(form, plain.chosen) == " there</s>"
    assert (found.counts, found.skipped, chat.learned) == ({}, 0, (None, None))
    ends = form.tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert sorted(found.taught) == sorted(ends)
    with_tail = encoded.encode_pairs(rows, form, max_length=200, tail=True).rows[0]
    assert text(form, with_tail.chosen) == "I am fine.<|im_end|>\n"
    assert with_tail.learned[0] == [True] * len(chat.chosen) + [False]


def test_pairs_that_part_before_the_last_turn():
    """The prompt is the common beginning; of each response only the assistant's turns are learned."""
    form = form_of()
    last = {"role": "assistant", "content": "Paris."}
    pair = Pair([USER], [REPLY, {"role": "user", "content": "hello"}, last], [{"role": "assistant", "content": "No"}])
    row = encoded.encode_pairs([pair], form, max_length=300).rows[0]
    assert row.prompt == tokens.encode_prompt(form, [USER]).ids
    learned = [i for i, on in zip(row.chosen, row.learned[0], strict=True) if on]
    assert text(form, learned) == "I am fine.<|im_end|>Paris.<|im_end|>"
    assert row.learned[1] is None
    assert "hello" in text(form, row.chosen)


def test_sides_whose_prompts_differ_share_their_beginning():
    """A first turn that the template writes in another form is given, on the side that has it alone."""
    form = form_of(cases.THINK)
    thought = {"role": "assistant", "content": "<think>one</think>Yes"}
    long = [thought, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "Paris."}]
    row = encoded.encode_pairs([Pair([USER], long, "No")], form, max_length=300).rows[0]
    both = [text(form, [*row.prompt, *side]) for side in (row.chosen, row.rejected)]
    start = f"<s><|user|>{USER['content']}<|assistant|>"
    assert both == [f"{start}Yes</s><|user|>hello<|assistant|>Paris.</s>", f"{start}No</s>"]
    said = [i for i, on in zip(row.chosen, row.learned[0], strict=True) if on]
    assert text(form, said) == "Paris.</s>"


@pytest.mark.parametrize("make", [cases.byte_level, cases.dummy_space])
def test_a_prompt_that_is_cut_keeps_bos_and_the_system_turn(make):
    form = form_of(make=make)
    whole = encoded.encode_pairs([Pair([SYSTEM, USER], "Yes", "No")], form, max_length=300).rows[0]
    length = len(whole.prompt) + len(whole.chosen)
    found = encoded.encode_pairs([Pair([SYSTEM, USER], "Yes", "No")], form, max_length=length - 5)
    row = found.rows[0]
    assert found.counts == {"cut_rows": 1, "cut_tokens": 5}
    assert len(row.prompt) + max(len(row.chosen), len(row.rejected)) == length - 5
    kept = text(form, row.prompt)
    assert "Yes, No." in kept
    assert kept.endswith("assistant\n")
    assert "ten" in kept
    assert "one two" not in kept
    assert row.prompt[: len(form.prefix)] == list(form.prefix)
    assert row.split_key == whole.split_key
    plain = tokens.text_format(make(bos=True))
    row = encoded.encode_pairs([Pair(USER["content"], " Yes", " No")], plain, max_length=9).rows[0]
    assert row.prompt[0] == 1
    assert len(row.prompt) + max(len(row.chosen), len(row.rejected)) == 9


def test_a_cut_may_be_refused_or_skip_the_row():
    form = form_of()
    rows = [Pair([USER], "Yes", "No", "f:1"), Pair("hello", " Yes", " No", "f:2")]
    with pytest.raises(ValueError, match=r"f:1: expected at most 20 tokens, found \d+"):
        encoded.encode_pairs(rows, form, max_length=20, on_long="error", skip_bad=True)
    found = encoded.encode_pairs(rows, form, max_length=20, on_long="skip")
    assert [row.where for row in found.rows] == ["f:2"]
    assert found.counts == {"long_rows": 1}
    with pytest.raises(ValueError, match="on_long: expected one of"):
        encoded.encode_pairs(rows, form, max_length=20, on_long="clip")
    examples = [Example(row.prompt, row.chosen, row.where) for row in rows]
    with pytest.raises(ValueError, match="f:1: expected at most 20 tokens"):
        encoded.encode_examples(examples, form, max_length=20, on_long="error")
    assert encoded.encode_examples(examples, form, max_length=20, on_long="skip").counts == {"long_rows": 1}
    given = [PromptRow([USER], "f:1"), PromptRow("hello", "f:2")]
    with pytest.raises(ValueError, match="f:1: expected at most 10 tokens"):
        encoded.encode_prompts(given, form, max_length=10)
    assert [row.where for row in encoded.encode_prompts(given, form, max_length=10, on_long="skip").rows] == ["f:2"]
    cut = encoded.encode_prompts(given, form, max_length=12, on_long="cut")
    assert len(cut.rows[0].tokens) == 12
    assert text(form, cut.rows[0].tokens).startswith("<|im_start|>user\n")
    assert cut.counts["cut_rows"] == 1


def test_responses_without_room_are_bad_rows():
    form = form_of()
    rows = [Pair([USER], USER["content"], "No", "f:7"), Pair("hello", " Yes", " No")]
    with pytest.raises(
        ValueError, match=r"f:7: expected a response of at most \d+ tokens, found \d+ .max_length 12, of"
    ):
        encoded.encode_pairs(rows, form, max_length=12)
    found = encoded.encode_pairs(rows, form, max_length=12, skip_bad=True)
    assert (found.skipped, len(found.rows)) == (1, 1)
    assert found.reasons[0].startswith("f:7: expected a response of at most")
    with pytest.raises(ValueError, match="expected two responses that differ"):
        encoded.encode_pairs([Pair("hello", " Yes", " Yes")], form, max_length=12)
    with pytest.raises(ValueError, match="expected at least one good row, found none among 1"):
        encoded.encode_pairs(rows[:1], form, max_length=12, skip_bad=True)


def test_conversations_learn_every_turn_and_are_cut_at_their_beginning():
    form = form_of()
    chat = [SYSTEM, USER, REPLY, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "Paris."}]
    whole = encoded.encode_examples([Example([], chat)], form, max_length=300).rows[0]
    said = [i for i, on in zip(whole.response, whole.learned, strict=True) if on]
    assert text(form, said) == "I am fine.<|im_end|>Paris.<|im_end|>"
    last = encoded.encode_examples([Example([], chat)], form, max_length=300, learn="last").rows[0]
    assert text(form, last.response) == "Paris.<|im_end|>"
    assert [*last.prompt, *last.response] == [*whole.prompt, *whole.response]
    length = len(whole.prompt) + len(whole.response)
    for less in (3, 20):
        found = encoded.encode_examples([Example([], chat)], form, max_length=length - less)
        row = found.rows[0]
        assert len(row.prompt) + len(row.response) == length - less
        assert found.counts == {"cut_rows": 1, "cut_tokens": less}
        assert row.learned[0]
        assert text(form, row.prompt).startswith("<|im_start|>system\nYes, No.<|im_end|>")
        said = [i for i, on in zip(row.response, row.learned, strict=True) if on]
        assert text(form, said).endswith("Paris.<|im_end|>")
    with pytest.raises(ValueError, match="f:1: expected an assistant's turn within 12 tokens"):
        encoded.encode_examples([Example([], chat)], form, max_length=12)


def test_texts_without_a_prompt_lose_their_end():
    form = tokens.text_format(cases.byte_level(bos=True))
    found = encoded.encode_examples([Example("", "one two three four five")], form, max_length=4)
    row = found.rows[0]
    assert (row.prompt, len(row.response), found.counts["cut_rows"]) == ([1], 3, 1)
    assert row.split_key == "one two three four five"


def test_notes_are_counted_and_described():
    form = tokens.text_format(cases.dummy_space())
    rows = [Example("Human: hello ", "Yes"), Example("Human: hello", " Yes </s> No"), Example("hello", " you")]
    found = encoded.encode_examples(rows, form, max_length=50)
    assert found.counts == {"boundary_rows": 1, "inner_end_rows": 1}
    assert encoded.describe(found.counts | {"cut_rows": 2, "cut_tokens": 9, "long_rows": 4}) == [
        "2 rows were cut by 9 tokens in all, after their header",
        "4 rows were left out, which are longer than the limit",
        f"1 rows: {tokens.NOTES['boundary']}",
        f"1 rows: {tokens.NOTES['inner_end']}",
    ]


def test_prompts_keep_their_source():
    form = form_of()
    chat, plain = encoded.encode_prompts([PromptRow([USER], "f:1"), PromptRow("hello", "f:2")], form).rows
    assert (chat.source, plain.source, plain.text) == ([USER], "hello", "hello")
    assert text(form, chat.tokens) == chat.text
    with pytest.raises(ValueError, match="f:3: expected at least one token"):
        encoded.encode_prompts([PromptRow("", "f:3")], form)


def test_what_is_not_learned_is_left_out_of_the_loss():
    row = encoded.TextTokens([3, 4], [5, 6, 7], "f:1", learned=[True, False, True])
    arrays = preferences.pad_texts([row], length=7)
    assert arrays["loss_mask"].tolist() == [[False, False, True, False, True, False, False]]
    assert arrays["mask"].sum() == 5
    pair = encoded.PairTokens([3], [5, 6], [7], "f:1", learned=([False, True], None))
    arrays = preferences.pad_pairs([pair], length=3)
    assert [arrays[side]["loss_mask"].tolist() for side in ("chosen", "rejected")] == [
        [[False, False, True]],
        [[False, True, False]],
    ]

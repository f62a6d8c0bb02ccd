"""Every form of data that is known, with columns and without, and the table of docs/data.md that shows them."""

from __future__ import annotations

import copy
import json
import random
import re

import pytest

from jaxalign import data
from jaxalign.data import chats, fields
from tests import forms, odd_rows

IDS = [case.name for case in forms.CASES]


def file(tmp_path, rows, name: str = "d.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(row):
    """(prompt, chosen, rejected) of a pair, (prompt, response) of a text to learn."""
    return tuple(getattr(row, name) for name in row._fields if name in ("prompt", "chosen", "rejected", "response"))


def options(case, *names):
    return {name: case.options[name] for name in names if name in case.options}


@pytest.mark.parametrize("case", forms.CASES, ids=IDS)
def test_every_form_gives_pairs_texts_and_prompts(case, tmp_path):
    path = file(tmp_path, case.rows)
    shared = options(case, "columns", "as_messages")
    choice = options(case, "safer", "score")
    for read, more, expected in (
        (data.read_pairs, choice | options(case, "compare"), case.pairs),
        (data.read_examples, choice, case.examples),
        (data.read_prompts, {}, case.prompts),
    ):
        if expected is None:
            with pytest.raises(ValueError, match=r"d\.jsonl:1: expected .*, found fields \["):
                read(path, **shared, **more)
            continue
        found = read(path, **shared, **more)
        parts = [row.prompt if read is data.read_prompts else texts_of(row) for row in found.rows]
        assert parts == [part if read is data.read_prompts else tuple(part) for part in expected]
        assert all(row.where.startswith(f"{path}:") for row in found.rows)
        assert (found.skipped, list(found.reasons)) == (0, [])
        if read is data.read_pairs:
            assert found.counts == case.counts


def test_the_page_of_data_has_the_table_of_these_cases():
    page = forms.PAGE.read_text()
    assert forms.written(page) == page, "python -m tests.forms writes the table anew"


@pytest.mark.parametrize("case", forms.CASES, ids=IDS)
def test_messages_and_text_are_not_mixed(case, tmp_path):
    """Of a row all parts are text or all are messages; with as_messages all are messages."""
    path = file(tmp_path, case.rows)
    for as_messages in (False, True):
        shared = options(case, "columns") | {"as_messages": as_messages, "skip_bad": True}
        for read, expected in ((data.read_pairs, case.pairs), (data.read_examples, case.examples)):
            if expected is None or (as_messages and case.name == "text"):
                continue
            for row in read(path, **shared).rows:
                parts = [row.prompt, row.response] if read is data.read_examples else list(row[1:4])
                assert {isinstance(part, str) for part in parts} in ({False}, {as_messages is False})


def test_margins_are_differences_of_scores(tmp_path):
    rows = {
        "UltraFeedback (binarized)": [2.5],
        "UltraFeedback (as first published)": [5.5],
        "HelpSteer2: scores of rows with one prompt": [3.0, 3.0],
        "HelpSteer3": [2.0],
        "Nectar: ranked list": [None] * 3,
        "SHP": [None],
        "explicit prompt, text": [None],
    }
    for case in forms.CASES:
        if case.name in rows:
            found = data.read_pairs(file(tmp_path, case.rows)).rows
            assert [pair.margin for pair in found] == rows[case.name], case.name


def test_columns_take_the_place_of_the_fields_of_their_names(tmp_path):
    path = file(tmp_path, [{"prompt": "id-7", "q": "Hi", "chosen": "Yes", "rejected": "No"}])
    assert data.read_pairs(path, columns={"prompt": "q"}).rows[0][1:4] == ("Hi", "Yes", "No")
    swapped = data.read_pairs(path, columns={"prompt": "q", "chosen": "rejected", "rejected": "chosen"})
    assert swapped.rows[0][1:4] == ("Hi", "No", "Yes")
    scored = [{"q": "Hi", "a": answer, "s": {"all": score}} for answer, score in (("No", 1), ("Yes", 2))]
    columns = data.parse_columns("prompt=q, response=a, score=s.all")
    assert data.read_pairs(file(tmp_path, scored), columns=columns).rows[0][1:5] == ("Hi", "Yes", "No", 1.0)
    kept = [{"question": "Hi", "system": "Be kind.", "messages": "?", "text": "?", "a": "Yes", "b": "No"}]
    pair = data.read_pairs(file(tmp_path, kept), columns={"chosen": "a", "rejected": "b"}).rows[0]
    assert pair[1:4] == ([forms.system("Be kind."), forms.HI], [forms.YES], [forms.NO])
    example = data.read_examples(file(tmp_path, kept), columns={"response": "a"}).rows[0]
    assert texts_of(example) == ([forms.system("Be kind."), forms.HI], [forms.YES])
    assert data.read_examples(file(tmp_path, kept), columns={"text": "b"}).rows[0][1:3] == ("", "No")
    chats = [{"log": {"turns": [forms.HI, forms.YES]}, "text": "?", "prompt": "?"}]
    assert data.read_examples(file(tmp_path, chats), columns={"messages": "log.turns"}).rows[0].prompt == []
    dotted = [{"a.b": "Hi", "a": {"b": "?"}, "r": "Yes"}]
    assert data.read_examples(file(tmp_path, dotted), columns={"prompt": "a.b", "response": "r"}).rows[0].prompt == "Hi"


@pytest.mark.parametrize("text", ["prompt", "prompt=", "prompt=a,prompt=b", "winner=a", "=a"])
def test_columns_that_are_none_are_named(text):
    with pytest.raises(ValueError, match=r"^columns: expected"):
        data.parse_columns(text)


def test_a_column_that_is_not_there_is_named(tmp_path):
    path = file(tmp_path, [{"prompt": "Hi", "answers": [{"text": "Yes"}]}])
    for field in ("a", "answers.1.text", "answers.0.other", "answers.text", "prompt.0"):
        with pytest.raises(ValueError, match=rf"d\.jsonl:1: expected the field {field} of columns, found fields"):
            data.read_examples(path, columns={"prompt": "prompt", "response": field})
    with pytest.raises(ValueError, match=r"^columns: expected names among prompt"):
        data.read_pairs(path, columns={"promt": "prompt"})
    assert data.parse_columns("") == {}
    assert set(fields.COLUMNS) > {"prompt", "chosen", "rejected", "response", "messages"}


def test_ties_are_counted_and_make_no_pair(tmp_path):
    arena = {"conversation_a": [forms.HI, forms.NO], "conversation_b": [forms.HI, forms.YES]}
    rows = [
        *({**arena, "winner": winner} for winner in ("tie", "tie (bothbad)", "both_bad", "model_a")),
        {"context": [forms.HI], "response1": "a", "response2": "b", "overall_preference": 0},
        {"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
        {"prompt": "alone", "response": "a", "helpfulness": 1},
    ]
    path = file(tmp_path, rows)
    pairs, examples, prompts = data.read_pairs(path), data.read_examples(path), data.read_prompts(path)
    assert (len(pairs.rows), pairs.skipped, pairs.counts) == (1, 0, {"tie": 5, "single response": 1})
    assert (len(examples.rows), examples.counts) == (2, {"tie": 5})
    assert len(prompts.rows) == 7
    with pytest.raises(ValueError, match=r"found none in .* \(0 bad\), 3 tie$"):
        data.read_pairs(file(tmp_path, rows[:3]))
    with pytest.raises(ValueError, match=r"^compare: expected one of"):
        data.read_pairs(path, compare="some")


def test_rows_of_one_prompt_are_compared_wherever_they_stand(tmp_path):
    rows = [{"prompt": p, "response": r, "helpfulness": s} for p, r, s in ("ax1", "by2", "az3", "bw5", "av3")]
    rows = [{**row, "helpfulness": int(row["helpfulness"])} for row in rows]
    found = data.read_pairs(file(tmp_path, rows))
    sides = [(pair.prompt, pair.chosen, pair.rejected, pair.where.rpartition(":")[2]) for pair in found.rows]
    assert sides == [("a", "z", "x", "3"), ("a", "v", "x", "5"), ("b", "w", "y", "4")]
    assert found.counts == {"tie": 1}
    best = data.read_pairs(file(tmp_path, rows), compare="best").rows
    assert [(pair.chosen, pair.rejected) for pair in best] == [("z", "x"), ("w", "y")]
    same = [{**rows[0], "helpfulness": i} for i in range(2)]
    found = data.read_pairs(file(tmp_path, same + rows))
    assert (len(found.rows), found.counts["same responses"]) == (7, 2)
    other = [{**row, "coherence": -row["helpfulness"]} for row in rows]
    assert data.read_pairs(file(tmp_path, other), score="coherence").rows[0].chosen == "x"


def test_text_becomes_turns_where_that_is_wanted(tmp_path):
    def turns(row, read=data.read_pairs):
        return texts_of(read(file(tmp_path, [row]), as_messages=True).rows[0])

    later = " Yes\n\nHuman: So?\n\nAssistant: Fine"
    hh = {"chosen": forms.HH + later, "rejected": forms.HH + " No"}
    assert turns(hh)[:3] == ([forms.HI], [forms.YES, forms.MORE, forms.FINE], [forms.NO])
    assert turns({"prompt": "Hi", "chosen": "Yes", "rejected": "No"})[:3] == ([forms.HI], [forms.YES], [forms.NO])
    whole = {"text": forms.HH + later}
    assert turns(whole, data.read_examples) == ([], [forms.HI, forms.YES, forms.MORE, forms.FINE])
    assert turns(whole, data.read_prompts) == ([forms.HI, forms.YES, forms.MORE],)
    assert turns({"prompt": "\n\nHuman: Hi\n\nAssistant: Ye"}, data.read_prompts) == (
        [forms.HI, forms.assistant("Ye")],
    )
    extra = {"prompt": "Hi\n<extra_id_1>Assistant\nYes\n<extra_id_1>User\nSo?", "response": "Fine"}
    assert turns(extra, data.read_examples) == ([forms.HI, forms.YES, forms.MORE], [forms.FINE])
    assert turns({"prompt": "What does Human: mean?\n\nHuman: x"}, data.read_prompts)[0][0]["role"] == "user"
    with pytest.raises(ValueError, match=r"expected turns, .* found plain text"):
        data.read_examples(file(tmp_path, [{"text": "plain"}]), as_messages=True)


def test_rows_of_several_forms_stand_in_one_file(tmp_path):
    cases = [case for case in forms.CASES if not case.options and case.pairs and len(case.rows) == 1]
    path = file(tmp_path, [row for case in cases for row in case.rows])
    assert [tuple(pair[1:4]) for pair in data.read_pairs(path).rows] == [p for case in cases for p in case.pairs]


# Odd rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory):
    lines = [odd.row if isinstance(odd.row, bytes) else json.dumps(odd.row).encode() for odd in odd_rows.ROWS]
    path = tmp_path_factory.mktemp("odd") / "odd.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize("name", ["pairs", "examples", "prompts"])
def test_of_a_file_of_odd_rows_each_is_right_or_named(name, odd_file):
    found = getattr(data, f"read_{name}")(odd_file, skip_bad=True)
    given: dict[str, list] = {}
    for row in found.rows:
        part = row.prompt if name == "prompts" else texts_of(row)
        given.setdefault(row.where.rpartition(":")[2], []).append(part)
    expected = {str(line): getattr(odd, name) for line, odd in enumerate(odd_rows.ROWS, start=1)}
    good = {line: rows for line, rows in expected.items() if not isinstance(rows, odd_rows.Bad) and rows}
    assert given == good
    bad = [line for line, rows in expected.items() if isinstance(rows, odd_rows.Bad)]
    assert found.skipped == len(bad)
    assert len(found.reasons) == 20
    assert len(odd_rows.ROWS) > 60


NAMED = [
    (number, name)
    for number, odd in enumerate(odd_rows.ROWS)
    for name in ("pairs", "examples", "prompts")
    if isinstance(getattr(odd, name), odd_rows.Bad)
]


@pytest.mark.parametrize(("number", "name"), NAMED)
def test_an_odd_row_is_named_with_file_and_line(number, name, tmp_path):
    odd = odd_rows.ROWS[number]
    outcome = getattr(odd, name)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n" + (odd.row if isinstance(odd.row, bytes) else json.dumps(odd.row).encode()))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:2: .*{re.escape(outcome.reason)}"):
        getattr(data, f"read_{name}")(path)


VALUES = [3, True, [], {}, "", "x", [None], [{}], ["a"], {"role": "user"}, [forms.HI], [odd_rows.CALL], forms.HH, 1e400]


def damaged(row, rng):
    """The row with one of its values, at any depth, in place of another."""
    row = copy.deepcopy(row)
    places = []

    def visit(value):
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            visit(value[key])

    visit(row)
    if places:
        holder, key = rng.choice(places)
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return row


@pytest.mark.parametrize("as_messages", [False, True])
def test_damaged_rows_are_left_out_or_are_all_text_or_all_messages(as_messages, tmp_path):
    rng = random.Random(0)
    whole = [row for case in forms.CASES for row in case.rows]
    whole += [odd.row for odd in odd_rows.ROWS if isinstance(odd.row, dict)]
    path = file(tmp_path, [damaged(row, rng) for row in whole for _ in range(8)])
    for read in (data.read_pairs, data.read_examples, data.read_prompts):
        found = read(path, skip_bad=True, as_messages=as_messages)
        assert len(found.rows) > 30
        assert found.skipped > 100
        for row in found.rows:
            parts = [part for part in row[1:] if isinstance(part, str | list)]
            assert {isinstance(part, str) for part in parts} in ({False}, {not as_messages})
            turns = [turn for part in parts if isinstance(part, list) for turn in part]
            assert all(turn["role"] in chats.ROLES.values() for turn in turns)
            assert all(isinstance(turn["content"], str) or "tool_calls" in turn for turn in turns)

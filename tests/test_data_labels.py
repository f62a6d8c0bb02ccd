"""Labels and scores of single responses, as JSON and tables write them: each is read, or its row is bad."""

from __future__ import annotations

import json

import pytest

from jaxalign import data

TRUE = (True, 1, 1.0, "true", "True", "TRUE", "1", "1.0", " true ")
FALSE = (False, 0, 0.0, "false", "False", "FALSE", "0", "0.0")


def rows_of(tmp_path, rows):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(path):
    """(what pairs are read, what is learned, the counts)."""
    pairs, texts = data.read_pairs(path), data.read_examples(path)
    return [pair[1:4] for pair in pairs.rows], [text.response for text in texts.rows], texts.counts


LEARNED = ([("Hi", "Yes", "No")], ["Yes"], {"unwanted response": 1})


@pytest.mark.parametrize(("true", "false"), [*((true, False) for true in TRUE), *((True, false) for false in FALSE)])
def test_a_label_is_read_however_it_is_written(true, false, tmp_path):
    rows = [{"prompt": "Hi", "completion": "No", "label": false}, {"prompt": "Hi", "completion": "Yes", "label": true}]
    assert told(rows_of(tmp_path, rows)) == LEARNED


@pytest.mark.parametrize(("false", "true"), [("False", "True"), ("false", "true"), ("0", "1"), ("0.0", "1.0")])
def test_a_table_has_labels(false, true, tmp_path):
    (tmp_path / "d.csv").write_text(f"prompt,completion,label\nHi,No,{false}\nHi,Yes,{true}\n")
    assert told(tmp_path / "d.csv") == LEARNED


@pytest.mark.parametrize("value", ["no", "spam", "", 2, -1, 0.5, [True], {"a": 1}, "nan"])
def test_another_label_is_a_bad_row(value, tmp_path):
    path = rows_of(tmp_path, [{"prompt": "Hi", "completion": "Yes", "label": value}])
    for read in (data.read_pairs, data.read_examples, data.read_prompts):
        with pytest.raises(ValueError, match=r"d\.jsonl:1: expected true or false in label, found "):
            read(path)
        found = read(rows_of(tmp_path, [json.loads(path.read_text().splitlines()[0]), {"prompt": "a", "chosen": "b",
                                        "rejected": "c"}]), skip_bad=True)  # fmt: skip
        assert found.counts == {"label": 1}


def test_a_label_holds_beside_a_score(tmp_path):
    for name in ("helpfulness", "score"):
        row = {"prompt": "Hi", "completion": "No", name: 1}
        rows = [{**row, "label": "false"}, {**row, "completion": "Yes", name: 4, "label": True}]
        assert told(rows_of(tmp_path, rows)) == LEARNED


@pytest.mark.parametrize("name", ["score", "helpfulness"])
@pytest.mark.parametrize("end", ["csv", "jsonl"])
def test_scores_are_read_where_they_are_text(name, end, tmp_path):
    path = tmp_path / f"d.{end}"
    if end == "csv":
        path.write_text(f"prompt,response,{name}\nHi,No,1\nHi,Yes,2.5\n")
    else:
        rows_of(tmp_path, [{"prompt": "Hi", "response": r, name: s} for r, s in (("No", "1"), ("Yes", "2.5"))])
    (pair,) = data.read_pairs(path).rows
    assert pair[1:5] == ("Hi", "Yes", "No", 1.5)


@pytest.mark.parametrize("value", ["nan", "inf", "-Infinity", True])
def test_a_score_without_an_order_is_a_bad_row(value, tmp_path):
    path = rows_of(tmp_path, [{"prompt": "Hi", "response": "Yes", "score": value}])
    with pytest.raises(ValueError, match=r"d\.jsonl:1: expected a finite number in score, found "):
        data.read_examples(path)


def test_a_limit_that_cut_a_response_is_read_from_a_table(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,response,truncated\nHi,No,False\nHi,Yes,True\nHi,So,1\nHi,Do,0.0\n")
    assert [row.truncated for row in data.read_examples(tmp_path / "d.csv").rows] == [False, True, True, False]
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected,rejected_truncated\nHi,Yes,No,true\n")
    assert data.read_pairs(tmp_path / "p.csv").rows[0].truncated == (False, True)


@pytest.mark.parametrize(
    "row", [{"prompt": "Hi", "response": "Yes"}, {"messages": [{"role": "user", "content": "Hi"}]}, {"chosen": "Yes"}]
)
@pytest.mark.parametrize("system", [["Be kind."], 3, {"content": "Be kind."}])
def test_a_system_text_of_another_type_is_a_bad_row(row, system, tmp_path):
    with pytest.raises(ValueError, match=r"d\.jsonl:1: expected text in system, found "):
        data.read_examples(rows_of(tmp_path, [{**row, "system": system}]))


def test_columns_name_a_label(tmp_path):
    row = {"q": "Hi", "a": "No", "good": "False"}
    path = rows_of(tmp_path, [row, {**row, "a": "Yes", "good": "True"}])
    columns = data.parse_columns("prompt=q, response=a, label=good")
    assert [text.response for text in data.read_examples(path, columns=columns).rows] == ["Yes"]

"""Whatever a user names: kinds of files, lists, globs and folders of shards, the package datasets, and their faults."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import pathlib

import pytest

from jaxalign import _runs, data
from jaxalign.data import preferences, sources

ROWS = [{"prompt": f"p{i}", "chosen": 'Yes, "so"\nand', "rejected": "Nö"} for i in range(3)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, delimiter: str) -> bytes:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    header = delimiter.join(rows[0])
    return "\n".join([header, *(delimiter.join(map(cell, row.values())) for row in rows)]).encode()


def content(kind: str, rows) -> bytes:
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    return lines(rows) if kind == ".jsonl" else table(rows, "\t" if kind == ".tsv" else ",")


def packed(raw: bytes, end: str) -> bytes:
    if end == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(raw)
    return gzip.compress(raw) if end == ".gz" else raw


def prompts(source) -> list[str]:
    return [row.prompt for row in data.read_prompts(source).rows]


@pytest.mark.parametrize("end", sources.COMPRESSED)
@pytest.mark.parametrize("kind", sources.KINDS)
def test_every_kind_of_file_holds_the_same_rows(kind, end, tmp_path):
    path = tmp_path / f"d{kind}{end}"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(packed(mark + content(kind, ROWS), end))
        found = data.read_pairs(path).rows
        assert [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in found] == ROWS
    # A row of a table stands where it begins: each of these takes two lines, the header one.
    numbers = [2, 4, 6] if kind in (".csv", ".tsv") else [1, 2, 3]
    assert [pair.where for pair in found] == [f"{path}:{number}" for number in numbers]
    two = tmp_path / f"two{kind}.zst"
    if end == ".zst":  # frames one after the other, as shards are put together
        raw = content(kind, ROWS)
        two.write_bytes(packed(raw[:40], end) + packed(raw[40:], end))
        assert len(data.read_pairs(two).rows) == 3


def test_a_json_file_may_hold_a_row_in_each_line(tmp_path):
    (tmp_path / "d.json").write_bytes(lines(ROWS))
    assert prompts(tmp_path / "d.json") == ["p0", "p1", "p2"]


@pytest.mark.parametrize("end", sources.COMPRESSED)
def test_prompts_stand_in_lines_of_text(end, tmp_path):
    (tmp_path / f"p.txt{end}").write_bytes(packed("one\r\ntwö\n".encode(), end))
    assert prompts(tmp_path / f"p.txt{end}") == ["one", "twö"]
    with pytest.raises(ValueError, match=r"^data: expected a file that ends in \.jsonl, .* found suffix"):
        data.read_pairs(tmp_path / f"p.txt{end}")


def test_cells_of_tables_hold_lists_as_json(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    (tmp_path / "d.csv").write_bytes(table([{"messages": json.dumps(chat)}], ","))
    assert data.read_examples(tmp_path / "d.csv").rows[0].response == chat
    (tmp_path / "d.csv").write_bytes(table([{"messages": "Hi"}], ","))
    with pytest.raises(ValueError, match=r"d\.csv:2: expected a list in messages, found text that is no JSON"):
        data.read_examples(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"a,b", "not CSV"),
        (b"a,b,c,d", "not CSV"),
        (b'"a"b,c,d', "not CSV"),
        (b"a,\xe9,c", "not UTF-8"),
        (b'a,b,"c', "not CSV"),
        (b'a,b," "', "empty response"),
        (b'a,b,""', "no pair"),
        (b"a,b,b", "same responses"),
    ],
)
def test_a_bad_row_of_a_table_is_named(line, kind, tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b'prompt,chosen,rejected\np,"q\nr",s\n\n' + line)
    found = data.read_pairs(path, skip_bad=True)
    assert (len(found.rows), found.skipped, found.counts) == (1, 1, {kind: 1})
    assert found.reasons[0].startswith(f"{path}:5: expected")
    path.write_bytes(path.read_bytes() + (b'"' if line.endswith(b'"c') else b"") + b"\np,x,y\n")
    assert [pair.chosen for pair in data.read_pairs(path, skip_bad=True).rows][-1] == "x"


def test_bad_lines_of_prompts_and_arrays_are_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"one\n\xe9\n\ntwo\n")
    found = data.read_prompts(tmp_path / "p.txt", skip_bad=True)
    assert (len(found.rows), found.counts) == (2, {"not UTF-8": 1, "empty prompt": 1})
    (tmp_path / "d.json").write_text('[{"prompt": "Hi"}, 3, {"prompt": "\\ud83d"}, {"prompt": "Ho"}]')
    found = data.read_prompts(tmp_path / "d.json", skip_bad=True)
    assert [row.where.rpartition(":")[2] for row in found.rows] == ["1", "4"]
    assert found.counts == {"not an object": 1, "not UTF-8": 1}
    (tmp_path / "d.json").write_text('[{"prompt": "Hi"},')
    with pytest.raises(ValueError, match=r"^prompts: expected a JSON array in UTF-8, found .*d\.json"):
        data.read_prompts(tmp_path / "d.json")


def test_files_that_are_not_what_their_names_say(tmp_path):
    whole = packed(lines(ROWS), ".zst")
    for name, raw, reason in (
        ("d.jsonl.zst", b"raw", "expected zstandard data"),
        ("e.jsonl.zst", whole[:-9], "expected zstandard data, found an end"),
        ("d.csv.gz", b"raw", "expected gzip data"),
        ("d.parquet", b"raw", "expected a Parquet file"),
        ("d.csv", b"prompt,prompt,rejected\na,b,c\n", "expected a header of different names"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=rf"{reason}.*{name[:3]}|{name}:\d+: {reason}"):
            data.read_pairs(tmp_path / name)


def test_lists_and_globs_of_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, row in enumerate(ROWS):
        pathlib.Path(f"s{i}.jsonl").write_bytes(lines([row]))
    assert prompts("s2.jsonl, s0.jsonl") == ["p2", "p0"]
    assert prompts("s*.jsonl") == ["p0", "p1", "p2"]
    assert prompts("s[01].jsonl,s2.jsonl") == ["p0", "p1", "p2"]
    assert [row.where for row in data.read_prompts("s1.jsonl,s0.jsonl").rows] == ["s1.jsonl:1", "s0.jsonl:1"]
    pathlib.Path("a,b.jsonl").write_bytes(lines(ROWS[:1]))
    assert prompts("a,b.jsonl") == ["p0"]
    for missing in ("s*.csv", "s9.jsonl", "s0.jsonl,s9.jsonl"):
        with pytest.raises(ValueError, match=r"^prompts: .* found no such file at "):
            prompts(missing)


def test_folders_of_shards(tmp_path):
    for i, name in enumerate(["b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden/d.jsonl", "README.md"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lines([{"prompt": f"p{i}"}]))
    assert prompts(tmp_path) == ["p1", "p0", "p2"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^prompts: expected files that end in .*, found none in .*empty"):
        prompts(tmp_path / "empty")


def test_the_splits_of_a_folder_are_not_mixed(tmp_path):
    for i, name in enumerate(["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "test/x.jsonl"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lines([{"prompt": f"p{i}"}]))
    with pytest.raises(ValueError, match=r"^prompts: expected a split, .*@SPLIT, found files of test, train"):
        prompts(tmp_path)
    assert prompts(f"{tmp_path}@train") == ["p0", "p1"]
    assert prompts(f"{tmp_path}@test,{tmp_path}@train") == ["p2", "p0", "p1"]
    with pytest.raises(ValueError, match=r"^prompts: expected files of the split 'dev'"):
        prompts(f"{tmp_path}@dev")


def test_folders_of_the_package_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rows = [{"prompt": "p0", "messages": None}, {"prompt": None, "messages": chat}]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one")
    assert prompts(tmp_path / "one") == ["p0", chat[:1]]
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"^prompts: expected a split, .*two@SPLIT, found train, test"):
        prompts(tmp_path / "two")
    assert prompts(f"{tmp_path / 'two'}@test") == ["p0"]
    assert data.read_prompts(f"{tmp_path / 'two'}@test").rows[0].where == f"{tmp_path / 'two'}@test:1"
    for name, reason in (("two@dev", "expected a split among train, test"), ("one@dev", "expected no split")):
        with pytest.raises(ValueError, match=rf"^prompts: {reason}"):
            prompts(f"{tmp_path / name}")
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(ValueError, match=r"^prompts: expected a folder of the package datasets, found .*one"):
        prompts(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("owner/name@test", ("owner/name", None, {"split": "test"})),
        ("owner/name:easy@test", ("owner/name", "easy", {"split": "test"})),
        ("owner/name/a/b@test", ("owner/name", None, {"split": "test", "data_dir": "a/b"})),
        ("owner/name", ("owner/name", None, {})),
    ],
)
def test_data_sets_of_the_hub(name, call, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(path, config=None, **options):
        calls.append((path, config, options))
        rows = datasets.Dataset.from_list(ROWS)
        return rows if "split" in options else datasets.DatasetDict({"test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert prompts(name) == ["p0", "p1", "p2"]
    assert calls == [call]
    assert data.read_prompts(name).rows[1].where.endswith("@test:2")


def test_data_sets_of_the_hub_that_are_not_there(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(path, config=None, **options):
        if path == "owner/two":
            one = datasets.Dataset.from_list(ROWS)
            return datasets.DatasetDict({"train": one, "test": one})
        raise FileNotFoundError(f"no {path}")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"no file or folder owner/name, found no owner/name"):
        prompts("owner/name")
    with pytest.raises(ValueError, match=r"^prompts: expected a split, owner/two@SPLIT, found train, test"):
        prompts("owner/two")
    with pytest.raises(ValueError, match=r"^prompts: expected a file .*found no such file at owner/x.jsonl"):
        prompts("owner/x.jsonl")


@pytest.mark.parametrize(
    ("missing", "source", "extra"),
    [("zstandard", "d.jsonl.zst", "zst"), ("datasets", "owner/name", "datasets"), ("pyarrow", "d.parquet", "parquet")],
)
def test_a_package_that_is_missing_is_named(missing, source, extra, tmp_path, monkeypatch):
    (tmp_path / "d.jsonl.zst").write_bytes(b"")
    (tmp_path / "d.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.partition(".")[0] == missing:
            raise ImportError(missing)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=rf"^data: expected .*pip install 'jaxalign\[{extra}\]'"):
        data.read_pairs(source)


def test_a_run_keeps_the_times_of_all_files_that_a_source_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("train").mkdir()
    for name in ("a.jsonl", "b.jsonl", "train/train-0.jsonl"):
        pathlib.Path(name).write_bytes(lines(ROWS))
    reward = "models/a - 0.1 * module:function"  # a name of another kind, with a star
    for inputs in (["a.jsonl,b.jsonl"], ["?.jsonl"], ["a.jsonl", "b.jsonl", reward]):
        assert sorted(x.name for x in _runs._inputs(inputs)) == ["a.jsonl", "b.jsonl"]
    assert [x.name for x in _runs._inputs(["train@train"])] == ["train/train-0.jsonl"]


def test_rows_without_texts_of_a_tokenizer(tmp_path):
    """Every text of a row counts: ranked lists give all of theirs."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines([{"history": "Hi", "human_ref_A": " a", "human_ref_B": " b", "labels": 1}, {"text": "c"}]))
    assert preferences.read_strings(os.fspath(path)).rows == ["Hi a", " b", "c"]

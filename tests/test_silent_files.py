"""Files of which a part would be passed over in silence: a field, a column or an option that stands twice, texts in
another encoding or with other line ends, numbers that no option holds."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re

import pytest

from jaxalign import _options, commands, data, policies
from jaxalign._files import parse_json
from jaxalign.data import sources, text_options
from jaxalign.models.hf import files

TWICE = '{"prompt": "Hi", "chosen": "Yes", "rejected": "No", "chosen": "Maybe"}'
INSIDE = '{"prompt": [{"role": "user", "content": "Hi", "content": "Ho"}], "chosen": "Yes", "rejected": "No"}'
GOOD = '{"prompt": "Hi", "chosen": "Yes", "rejected": "No"}'
READERS = (data.read_pairs, data.read_examples, data.read_prompts)


@pytest.mark.parametrize(("row", "name"), [(TWICE, "chosen"), (INSIDE, "content")])
@pytest.mark.parametrize("end", ["jsonl", "json", "jsonl.gz"])
def test_a_row_with_a_field_twice_is_a_bad_row(row, name, end, tmp_path):
    path = tmp_path / f"d.{end}"
    text = f"[{GOOD},\n{row}]" if end == "json" else f"{GOOD}\n{row}\n"
    path.write_bytes(gzip.compress(text.encode()) if end.endswith("gz") else text.encode())
    for read in READERS:
        with pytest.raises(
            ValueError, match=rf"^{re.escape(str(path))}:2: expected each field once, found '{name}' twice"
        ):
            read(path)
        found = read(path, skip_bad=True)
        assert (len(found.rows), found.counts) == (1, {"field twice": 1})


def test_a_cell_with_a_field_twice_is_a_bad_row(tmp_path):
    cell = '[{""role"": ""user"", ""role"": ""assistant"", ""content"": ""Hi""}]'
    (tmp_path / "d.csv").write_text(f'messages\n"{cell}"\n')
    with pytest.raises(ValueError, match=r"d\.csv:2: expected each field once, found 'role' twice"):
        data.read_prompts(tmp_path / "d.csv")


def test_json_with_a_field_twice_is_named():
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]'):
        with pytest.raises(ValueError, match=r"^x\.json: expected JSON with each field once, found 'a' twice"):
            parse_json(text, "x.json")
    assert parse_json('{"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]}', "x") == {"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]}
    with pytest.raises(ValueError, match=r"^x: expected JSON, found Expecting"):
        parse_json("{", "x")


def test_a_generation_config_with_a_field_twice_is_named():
    with pytest.raises(
        ValueError, match=r"^generation_config: expected JSON with each field once, found 'top_k' twice"
    ):
        policies.read_generation_config('{"top_k": 5, "top_k": 50}')


def test_parquet_with_a_field_of_a_struct_twice_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parts = [pyarrow.array(["user"]), pyarrow.array(["assistant"]), pyarrow.array(["Hi"])]
    turn = pyarrow.StructArray.from_arrays(parts, names=["role", "role", "content"])
    parquet.write_table(pyarrow.table({"prompt": turn}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"^prompts: expected a Parquet file, found .*d\.parquet"):
        data.read_prompts(tmp_path / "d.parquet")


def test_keywords_of_a_template_with_a_field_twice_are_named():
    given = text_options.TextOptions(chat_template_kwargs='{"thinking": true, "thinking": false}')
    with pytest.raises(ValueError, match=r"chat_template_kwargs: expected .*'thinking' twice"):
        text_options.template_options(given)


def test_parquet_with_a_column_twice_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = [pyarrow.array(values) for values in (["Hi"], ["Yes"], ["No"], ["Maybe"])]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "chosen", "rejected", "chosen"])
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(
        ValueError, match=r"^data: expected a Parquet file, found the column 'chosen' twice in .*parquet"
    ):
        data.read_pairs(tmp_path / "d.parquet")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("end", ["txt", "csv", "jsonl"])
def test_texts_in_another_encoding_are_bad_rows(encoding, end, tmp_path):
    text = {"txt": "the cat\na dog\n", "csv": "prompt\nthe cat\n", "jsonl": '{"prompt": "the cat"}\n'}[end]
    path = tmp_path / f"d.{end}"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"expected") as found:
        data.read_prompts(path)
    assert str(path) in str(found.value)
    assert len(str(found.value).splitlines()) == 1
    if end == "txt":
        assert "1: expected UTF-8, found a zero byte, as UTF-16 has" in str(found.value)
    (tmp_path / "good.txt").write_text("the cat\n")
    rows = data.read_prompts(f"{tmp_path / 'good.txt'},{path}", skip_bad=True) if end == "txt" else None
    assert rows is None or [row.prompt for row in rows.rows] == ["the cat"]


def test_a_cell_with_zero_bytes_is_a_bad_row(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"prompt\nthe\0cat\n")
    with pytest.raises(ValueError, match=r"d\.csv:2: expected UTF-8, found a zero byte"):
        data.read_prompts(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"the cat\ra dog\rsat", ["the cat", "a dog", "sat"]),
        (b"\xef\xbb\xbfthe cat\ra dog\r", ["the cat", "a dog"]),
        (b"the cat\r\na dog\r\n", ["the cat", "a dog"]),
        (b"the cat\na dog", ["the cat", "a dog"]),
        ("the cat\u2028sat\x85on\x0bthe mat\n".encode(), ["the cat\u2028sat\x85on\x0bthe mat"]),
    ],
)
def test_lines_of_a_text_end_as_they_do_on_any_system(raw, expected, tmp_path):
    (tmp_path / "d.txt").write_bytes(raw)
    rows = list(sources.raw_rows(tmp_path / "d.txt", lines=True))
    assert [row for _, row in rows] == [{"prompt": prompt} for prompt in expected]
    assert [where.rpartition(":")[2] for where, _ in rows] == [str(1 + i) for i in range(len(expected))]


# Options --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """A group."""

    rate: float | None = None
    """A rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A config."""

    config: str = ""
    """A file of defaults."""
    seed: int = 0
    """A seed."""
    beta: float = 1.0
    """A number."""
    betas: tuple[float, ...] = ()
    """Numbers."""
    inner: Inner = dataclasses.field(default_factory=Inner)
    """A group."""


def parsed(path, *words):
    return commands.parse(Config, description="x", args=["--config", str(path), *words], prog="x")


@pytest.mark.parametrize(
    "text", ['{"seed": 1, "beta": 2, "seed": 3}', '{"inner": {"rate": 1.0, "rate": 2.0}}', '{"seed": 1, "seed": 1}']
)
def test_an_option_that_stands_twice_in_a_file_is_named(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    name = "rate" if "rate" in text else "seed"
    with pytest.raises(ValueError, match=rf"^config: expected each field once, found '{name}' twice in .*c\.json"):
        parsed(tmp_path / "c.json")


HUGE = "1" + "0" * 400


@pytest.mark.parametrize("end", ["json", "toml"])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("beta", HUGE, "float"),
        ("beta", f"-{HUGE}", "float"),
        ("rate", HUGE, r"float \| None"),
        ("betas", f"[1, {HUGE}]", "float"),
        ("seed", HUGE, "int of at most 64 bits"),
        ("seed", str(2**63), "int of at most 64 bits"),
    ],
)
def test_a_number_that_no_option_holds_is_named_with_its_file(name, value, expected, end, tmp_path):
    path = tmp_path / f"c.{end}"
    path.write_text(f'{{"{name}": {value}}}' if end == "json" else f"{name} = {value}\n")
    with pytest.raises(ValueError, match=rf"^{name}: expected {expected}, found -?\d+ in {re.escape(str(path))}$"):
        parsed(path)


def test_a_number_that_no_option_holds_is_named_in_python_and_on_the_command_line(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^beta: expected float, found 1000"):
        _options.from_fields(Config, {"beta": 10**400})
    with pytest.raises(SystemExit) as ended:
        commands.parse(Config, description="x", args=["--seed", HUGE], prog="x")
    assert ended.value.code == 2
    assert "x: error: --seed: expected a whole number of at most 64 bits, found 1000" in capsys.readouterr().err
    (tmp_path / "c.json").write_text(json.dumps({"seed": 2**63 - 1, "beta": 10**300}))
    assert parsed(tmp_path / "c.json") == Config(config=str(tmp_path / "c.json"), seed=2**63 - 1, beta=1e300)


def test_two_values_of_one_option_are_shown_however_large(tmp_path):
    (tmp_path / "c.json").write_text(f'{{"rate": {HUGE}, "inner": {{"rate": 1.0}}}}')
    with pytest.raises(ValueError, match=r"^rate: expected one value, found 1000.* in .*c\.json") as found:
        parsed(tmp_path / "c.json")
    assert len(str(found.value)) < 600


def test_a_field_of_a_models_folder_with_two_values_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"rms_norm_eps": 1e-6, "rope": {"theta": 1, "theta": 1}, "rms_norm_eps": 1.0}')
    with pytest.raises(
        ValueError, match=r"config.json: expected JSON, found 'rms_norm_eps' twice, as 1e-06 and 1.0 in "
    ):
        files.read_json(path)
    path.write_text('{"a": 1, "b": {"c": NaN, "c": NaN}, "a": 1}')
    assert files.read_json(path)["a"] == 1

"""Options from files and the command line, and the run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest

from jaxalign import _io, _runs, commands
from jaxalign.models import sharding


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a test."""

    model: str
    """Folder of the model."""
    steps: int = 10
    """Updates."""
    rate: float = 0.5
    """Step size [1]."""
    beta: tuple[float, ...] = (1.0,)
    """KL weights [nats]."""
    critic: commands.Repeated[tuple[str, ...]] = ()
    """One or several."""
    top_k: int | None = None
    """Candidates [tokens]."""
    fast: bool = True
    """Whether."""
    out: str = ""
    """Run folder."""
    config: str = ""
    """JSON or TOML file of defaults."""


def parse(*args: str) -> Config:
    return commands.parse(Config, description="a test", args=args)


def written(tmp_path, values, name="c.json") -> str:
    path = tmp_path / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    values = {"model": "m", "steps": 3, "rate": 2, "beta": [0.1, 0.2], "critic": ["a", "b"], "fast": False}
    path = written(tmp_path, values)
    assert parse("--config", path) == Config("m", 3, 2.0, (0.1, 0.2), ("a", "b"), None, False, config=path)
    assert isinstance(parse("--config", path).rate, float)
    for form in (["--config", path], [f"--config={path}"]):
        found = parse(*form, "--model", "n", "--beta", "4", "--critic", "c", "--top-k=5", "--fast")
        assert found == Config("n", 3, 2.0, (4.0,), ("c",), 5, True, config=path)
    # A required option may come from either side.
    assert parse("--config", written(tmp_path, {"steps": 4}), "--model", "m").steps == 4
    toml = written(tmp_path, 'model = "m"\nbeta = [3.0]\n[other]\n', "c.toml")
    with pytest.raises(ValueError, match=r"config: .* found \['other'\]"):
        parse("--config", toml)
    assert parse("--config", written(tmp_path, 'model = "m"\nbeta = [3.0]\n', "c.toml")).beta == (3.0,)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", "3", "int"),
        ("steps", 3.5, "int"),
        ("steps", True, "int"),
        ("steps", None, "int"),
        ("rate", "x", "float"),
        ("rate", False, "float"),
        ("beta", 0.5, "tuple"),
        ("beta", [0.5, "x"], "float"),
        ("critic", "a", "tuple"),
        ("top_k", "all", "None"),
        ("fast", 1, "bool"),
        ("model", 1, "str"),
    ],
)
def test_a_value_of_another_type_is_named(name, value, expected, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*{expected}.* found .*c\.json"):
        parse("--config", written(tmp_path, {"model": "m"} | {name: value}))


def test_files_that_cannot_be_read_are_named(tmp_path):
    for text, name in (("{", "c.json"), ("[1]", "c.json"), ("a = ", "c.toml")):
        with pytest.raises(ValueError, match=rf"^config: .*{name}"):
            parse("--config", written(tmp_path, text, name))
    with pytest.raises(ValueError, match=r"^config: .* found none"):
        parse("--config", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"^config: .* found \['step'\]"):
        parse("--config", written(tmp_path, {"model": "m", "step": 1}))


def test_unknown_and_missing_options_end_the_program(tmp_path, capsys):
    for args, named in (
        (["--model", "m", "--stepps", "1"], "--stepps"),
        ([], "--model"),
        (["--config", written(tmp_path, {"steps": 4})], "--model"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(*args)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--help")
    assert "Candidates [tokens]" in " ".join(capsys.readouterr().out.split())


def test_each_command_of_a_help_text_is_a_line_of_its_own(capsys):
    with pytest.raises(SystemExit):
        commands.parse(Config, description="Do:\n\npython -m a.b x\npython -m a.b y\n\nand\ngo on.", args=["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "a.b" in line] == ["python -m a.b x", "python -m a.b y"]
    assert "and go on." in lines


def test_a_run_folder_holds_config_and_versions_and_its_config_runs_again(tmp_path):
    out = tmp_path / "a" / "run"
    config = parse("--model", "m", "--critic", "a", "--critic", "b", "--out", str(out))
    assert _runs.open_run(out, config) == out
    assert sorted(path.name for path in out.iterdir()) == [".lock", "config.json", "inputs.json", "versions.json"]
    assert {"python", "device", *_runs.PACKAGES} == set(json.loads((out / "versions.json").read_text()))
    again = parse("--config", str(out / "config.json"))
    assert dataclasses.replace(again, config="") == config
    _runs.open_run(out, again)


def test_a_folder_of_another_run_is_refused(tmp_path):
    out = tmp_path / "run"
    _runs.open_run(out, Config("m", out="x"))
    _runs.open_run(out, Config("m", out="y", config="z"))
    before = (out / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"^beta: expected \[1.0\] .* found \[2.0\]"):
        _runs.open_run(out, Config("m", beta=(2.0,)))
    assert (out / "config.json").read_bytes() == before
    # A field that one of the two lacks differs too.
    (out / "config.json").write_text(json.dumps(json.loads(before) | {"old_option": 1}))
    with pytest.raises(ValueError, match=r"^old_option"):
        _runs.open_run(out, Config("m"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"^out: "):
        _runs.open_run(tmp_path / "mine", Config("m"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_run_that_is_opened_again_is_an_unchanged_input_of_others(tmp_path):
    table, reader = tmp_path / "table", tmp_path / "reader"
    _runs.open_run(table, Config("m"))
    _runs.open_run(reader, Config("m"), inputs=[str(table)])
    for path in table.iterdir():
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))  # as if it had been a while ago
    (reader / "inputs.json").unlink()
    _runs.open_run(reader, Config("m"), inputs=[str(table)])
    _runs.open_run(table, Config("m"))
    _runs.open_run(reader, Config("m"), inputs=[str(table)])


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    _io.write_json(path, {"a": 1})
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            _io.write_json(path, {"a": bad})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_mesh():
    assert sharding.make_mesh("") is None
    mesh = sharding.make_mesh("data=1")
    assert mesh is not None
    assert mesh.shape == {"data": 1}
    for bad in (
        "1",
        "data",
        "data=",
        "data=0",
        "data=-2",
        "data=x",
        "rows=1",
        "data=1000000",
        "data=1,data=1",
        "fsdp=-1,data=-1",
    ):
        with pytest.raises(ValueError, match=r"^mesh: "):
            sharding.make_mesh(bad)


def test_a_run_does_not_go_on_with_other_inputs(tmp_path):
    out, model = tmp_path / "run", tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    (tmp_path / "prompts.txt").write_text("x")
    inputs = [str(model), str(tmp_path / "prompts.txt"), str(tmp_path / "hub-name")]
    _runs.open_run(out, Config("m"), inputs=inputs)
    _runs.open_run(out, Config("m"), inputs=inputs)
    stamp = os.stat(model / "weights")
    (model / "weights").write_text("2")
    os.utime(model / "weights", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"^inputs: .*model/weights"):
        _runs.open_run(out, Config("m"), inputs=inputs)
    os.utime(model / "weights", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    _runs.open_run(out, Config("m"), inputs=inputs)
    (model / "more").touch()
    with pytest.raises(ValueError, match=r"^inputs: .*model/more"):
        _runs.open_run(out, Config("m"), inputs=inputs)

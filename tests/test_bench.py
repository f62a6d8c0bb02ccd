"""The benchmarks at tiny sizes: their options, the columns of their rows, and the file that they write."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from eval.bench import __main__ as bench
from eval.bench import score
from jaxalign import models

SMALL = ("--layers", "1", "--width", "64", "--repeats", "1")
DRAWS = (*SMALL, "--batch", "1", "2", "--prompt", "3", "--new", "2")
SIZES = {
    "decode": (*DRAWS, "--no-torch"),
    "args": (*DRAWS, "--no-torch", "--k", "2"),
    "genarm": DRAWS,
    "score": (*SMALL, "--batch", "2", "--length", "7", "--vocab", "50", "--chunk", "4"),
}
COLUMNS = {
    "decode": ["batch", "jaxalign tokens/s"],
    "args": ["batch", "k", "jaxalign tokens/s"],
    "genarm": ["batch", "base tokens/s", "genarm tokens/s", "cost"],
    "score": [
        "pass",
        "jaxalign s",
        "log_softmax s",
        "speed ratio",
        "jaxalign temp MB",
        "log_softmax temp MB",
        "temp ratio",
        "jaxalign total MB",
        "log_softmax total MB",
        "total ratio",
        "model temp MB",
        "max difference",
    ],
}


@pytest.mark.parametrize("name", SIZES)
def test_prints_and_writes_its_rows(name, tmp_path, capsys):
    bench.main([name, *SIZES[name], "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.json"]
    written = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert written.keys() == {"device", "jax", "rows"}
    assert [list(row) for row in written["rows"]] == [COLUMNS[name]] * 2
    first = [row[COLUMNS[name][0]] for row in written["rows"]]
    assert first == (["forward", "gradient"] if name == "score" else [1, 2])
    for row in written["rows"]:
        for column, value in row.items():
            # A program may need no buffer, and two results may be equal.
            least = 0 if "temp" in column or column == "max difference" else 1e-12
            assert isinstance(value, str) or value >= least, column
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{name} on ")
    assert len(printed) == 5  # the device, the columns, two rows, the path
    for column in COLUMNS[name]:
        assert column in printed[1]


def test_options_come_from_a_file_and_the_command_line_overrides_it(tmp_path):
    values = {"layers": 1, "width": 64, "repeats": 1, "prompt": 3, "new": 2, "batch": [1, 2], "dtype": "bfloat16"}
    (tmp_path / "c.json").write_text(json.dumps(values))
    bench.main(["genarm", "--config", str(tmp_path / "c.json"), "--batch", "3", "--out", str(tmp_path)])
    assert [row["batch"] for row in json.loads((tmp_path / "genarm.json").read_text())["rows"]] == [3]
    (tmp_path / "c.json").write_text(json.dumps(values | {"length": 4}))
    with pytest.raises(ValueError, match=r"config: .* found \['length'\]"):
        bench.main(["genarm", "--config", str(tmp_path / "c.json")])


@pytest.mark.parametrize("name", SIZES)
def test_unknown_options_are_refused_and_help_names_all(name, capsys):
    for extra in (("--bacth", "1"), ("--dtype", "int8")):
        with pytest.raises(SystemExit) as ended:
            bench.main([name, *extra])
        assert ended.value.code == 2
        assert extra[0] in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        bench.main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--batch", "--repeats", "--dtype", "--mesh", "--out", "--config"):
        assert option in printed


def test_the_benchmarks_are_listed(capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in SIZES:
        assert f"    {name} " in printed
    for arguments in ([], ["speed"]):
        with pytest.raises(SystemExit) as ended:
            bench.main(arguments)
        assert ended.value.code == 2


@pytest.mark.parametrize(
    ("name", "extra", "match"),
    [
        ("decode", ("--batch", "0"), "batch"),
        ("decode", ("--new", "0"), "new"),
        ("args", ("--width", "96"), "width"),
        ("args", ("--k", "0"), "k: "),
        ("genarm", ("--mesh", "rows=2"), "mesh"),
        ("genarm", ("--mesh", "data=1000"), "mesh"),
        ("score", ("--length", "1"), "length"),
        ("score", ("--chunk", "0"), "chunk"),
    ],
)
def test_bad_values_are_named(name, extra, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        bench.main([name, *SIZES[name], *extra, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


TWO_DEVICES = """
import sys
from eval.bench import __main__ as bench
for name, sizes in {sizes!r}.items():
    bench.main([name, *sizes, "--batch", "2", "--mesh", "data=2"])
    try:
        bench.main([name, *sizes, "--batch", "3", "--mesh", "data=2"])
    except ValueError as error:
        assert str(error).startswith("mesh: expected a divisor"), error
    else:
        sys.exit(name + ": 2 devices took a batch of 3")
"""


def test_a_mesh_shares_each_batch_and_must_divide_it():
    root = pathlib.Path(__file__).parent.parent
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    found = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES.format(sizes=SIZES)],
        cwd=root,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    for name in SIZES:
        assert f"{name} on cpu" in found.stdout


def test_score_refuses_a_wrong_result(monkeypatch):
    def wrong(lm, params, hidden, targets, *, chunk):
        return models.token_log_prob(lm, params, hidden, targets, chunk=chunk) + scale

    small = score.Config(batch=2, length=7, vocab=50, layers=1, width=64, repeats=1)
    for scale in (1e-3, jnp.nan):
        monkeypatch.setattr(score, "models", type("", (), {"token_log_prob": staticmethod(wrong)}))
        with pytest.raises(RuntimeError, match=r"score forward: expected a difference of at most 0\.0001"):
            score.run(small)
    assert jax.devices()

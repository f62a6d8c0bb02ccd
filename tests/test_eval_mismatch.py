"""eval.mismatch: what is measured, and that it fails where a bound does not hold."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eval import mismatch as command
from jaxalign import commands, models
from jaxalign.evaluation import mismatch
from tests.conftest import tiny_lm

SMALL = ("--rows", "4", "--batches", "3", "--length", "6", "--max-new-tokens", "5", "--deterministic", "2")
SMALL += ("--dtype", "bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mismatch") / "model"
    models.save(path, *tiny_lm(0, num_layers=1))
    return str(path)


def test_a_model_is_within_its_bounds_and_deterministic_programs_agree_to_the_bit(folder, tmp_path, capsys):
    command.main(["--model", folder, *SMALL, "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out/mismatch.json").read_text())
    assert {(row["dtype"], row["compared"]) for row in rows} == {
        ("bfloat16", name)
        for name in (
            "scorer to sampler",
            "scorer to batch 4",
            "deterministic=2, sampler to batch 4",
            "deterministic=2, scorer to batch 4",
            "deterministic=2, exact scorer to sampler",
            "deterministic=2, scorer to sampler",
        )
    }
    for row in rows:
        assert row["holds"]
        assert row["tokens"] > 10
        if row["largest_bound"] == 0:
            assert (row["largest"], row["equal_bits"], row["other_tokens"], row["kl"]) == (0, 1, 0, 0)
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(rows) + 2
    assert "above" not in printed


def test_a_bound_that_does_not_hold_ends_with_exit_code_1(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(mismatch.BOUNDS, "bfloat16", (-1.0, -1.0))
    given = ["--model", folder, *SMALL, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        commands.execute(command.main, given)
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "error: MismatchError: mismatch: expected differences within their bounds, found 4 of 10 above" in shown.err
    assert shown.out.count("above") == 4
    assert not all(row["holds"] for row in json.loads((tmp_path / "mismatch.json").read_text()))


def test_a_row_counts_what_differs():
    mask = np.array([[True, True], [True, False]])
    sampled = np.array([[-1.0, -2.0], [-3.0, 7.0]], np.float32)
    scored = sampled + np.array([[0.0, 0.75], [-0.01, 5.0]], np.float32)
    margins = np.array([0.9, 0.5, 0.1])
    row = mismatch._row("bfloat16", "a to b", 2, scored, sampled, mask, 0.0, margins, (0.05, 0.005))
    assert (row.tokens, row.largest, row.equal_bits, row.weights_cut, row.ratios_clipped) == (
        3,
        0.75,
        1 / 3,
        1 / 3,
        0.5,
    )
    assert row.mean == pytest.approx(0.76 / 3)
    assert row.near_edge == pytest.approx(2 / 3)
    assert row.kl == pytest.approx((np.expm1(0.75) - 0.75 + np.expm1(-0.01) + 0.01) / 3)
    assert not row.holds
    assert row._replace(largest=0.04, mean=0.004).holds
    same = row._replace(largest=0.0, mean=0.0, largest_bound=0.0, mean_bound=0.0, equal_bits=1.0)
    assert same.holds
    assert not same._replace(other_tokens=0.1).holds


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("rows: expected at least 1", {"rows": 0}),
        ("batches: expected at most the 32 rows", {"batches": (33,)}),
        ("dtypes: expected some of", {"dtype": ("float16",)}),
    ],
)
def test_options_are_checked(match, changes):
    with pytest.raises(ValueError, match=f"^{match}"):
        command.run(command.Config(model="nowhere", **changes))

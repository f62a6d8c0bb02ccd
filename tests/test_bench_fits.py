"""eval.bench fits: rows of every job, and figures of all layers from a line through two depths."""

from __future__ import annotations

import json
import pathlib

import pytest

import train
from eval.bench import fits, shapes

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
TINY = shapes.LLAMA | SIZES | {"num_hidden_layers": 6, "vocab_size": 512}
REWARD = TINY | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}


def test_every_job_of_a_dry_run_has_a_row(tmp_path):
    """train.preferences draws by the program of train.calibrate."""
    found = {job for job, _ in fits.jobs(fits.Config(), tmp_path, 1).values()}
    scripts = pathlib.Path(train.__file__).parent.glob("*.py")
    able = {path.stem for path in scripts if "run: RunOptions" in path.read_text()}
    assert found == able - {"preferences"} | {"decode"}


def figures(total: float) -> dict[str, float]:
    return {"devices": 8, "tokens": 16, **dict.fromkeys(fits.FIGURES, total)}


def test_a_line_through_two_depths_and_how_far_a_third_lies_off_it():
    found, off = fits.at_depth({2: figures(10), 4: figures(16), 8: figures(28)}, 32)
    assert found == figures(100)
    assert off == 0
    _, off = fits.at_depth({2: figures(10), 4: figures(16), 8: figures(35)}, 32)
    assert off == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("layers", "reward", "error"),
    [
        (
            (2, 4),
            "Skywork-Reward-V2-Qwen3-8B",
            r"layers: expected one number for models of \[32, 36\] layers, found .*",
        ),
        ((2, 2), fits.REWARD, r"layers: expected different numbers, found \(2, 2\)"),
    ],
)
def test_depths_that_make_no_line_are_refused(layers, reward, error):
    with pytest.raises(ValueError, match=f"^{error}$"):
        fits.run(fits.Config(layers=layers, reward=reward))


def test_jobs_of_a_table_read_one_without_weights_and_their_figures_are_on_the_line(tmp_path, monkeypatch, capsys):
    for name, shape in (("tiny", TINY), ("tiny reward", REWARD)):
        monkeypatch.setitem(shapes.SHAPES, name, shape)
    config = fits.Config(
        jobs=("distil, LoRA", "regress, LoRA"),
        mesh=("data=1",),
        length=96,
        new=16,
        layers=(1, 2, 3),
        base="tiny",
        reward="tiny reward",
        out=str(tmp_path / "out"),
    )
    rows = fits.run(config)
    for row in rows:
        assert list(row["depths"]) == [1, 2, 3]
        assert 0 < row["off"] < 0.1
        assert row["parameters"] == 6 * (row["depths"][2]["parameters"] - row["depths"][1]["parameters"])
        assert row["frozen"] > row["depths"][3]["frozen"]
    distil, regress = rows
    assert regress["temporaries"] < distil["temporaries"]  # a row has one text, not two
    assert 1.5 < regress["frozen"] / distil["frozen"] < 2.2  # base and reward, both in bfloat16
    assert capsys.readouterr().out.count("% at 3 layers |") == 2
    assert [row["step"] for row in json.loads((tmp_path / "out/fits.json").read_text())["rows"]] == [*config.jobs]

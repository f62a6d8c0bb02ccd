"""The benchmarks at tiny sizes: their options, the columns of their rows, and the file that they write."""

from __future__ import annotations

import json
import math
import re
import time

import pytest

from eval.bench import __main__ as bench
from eval.bench import preset, score, train, transfer
from eval.bench.gpu import child
from jaxalign import losses, models
from tests.conftest import on_devices

SMALL = ("--layers", "1", "--width", "64", "--repeats", "1")
DRAWS = (*SMALL, "--batch", "2", "--prompt", "3", "--new", "2")
SIZES = {
    "decode": (*DRAWS, "--no-torch"),
    "args": (*DRAWS, "--no-torch", "--k", "2"),
    "genarm": DRAWS,
    "deterministic": (*DRAWS, "--chunk", "2", "--vocab", "50"),
    "distribution": (*DRAWS, "--k", "3", "--support", "3", "--rows", "2", "--length", "4"),
    "speculative": (
        *(*DRAWS, "--new", "5", "--method", "cd", "--vocab", "50", "--noise", "0", "--spread", "0.1"),
        *("--draft-layers", "1", "--draft-width", "64", "--draft-tokens", "2"),
    ),
    "blockwise": (*DRAWS, "--candidates", "3", "--block", "2"),
    "transfer": (*DRAWS, "--no-torch", "--k", "2", "--lookahead", "2"),
    "recontrol": (*DRAWS, "--steps", "2", "--times", "2"),
    "ggro": (*DRAWS, "--candidates", "2", "--k", "3"),
    "score": (*SMALL, "--batch", "2", "--length", "7", "--vocab", "50", "--chunk", "4"),
    "train": (*SMALL, "--batch", "2", "--length", "7", "--no-torch"),
    "rl": (
        *("--layers", "1", "--width", "64", "--vocab", "50", "--repeats", "1", "--no-torch"),
        *("--batch", "4", "--samples", "2", "--prompt", "3", "--new", "2"),
    ),
    "shaping": (*SMALL, "--prompts", "20", "--samples", "5", "--batch", "2", "--length", "7"),
}
COLUMNS = {
    "decode": ["batch", "jaxalign tokens/s"],
    "args": ["batch", "k", "jaxalign tokens/s"],
    "blockwise": ["batch", "candidates", "block", "together tokens/s", "one by one tokens/s", "ratio"],
    "transfer": ["batch", "k", "lookahead", "jaxalign tokens/s"],
    "genarm": ["batch", "base tokens/s", "genarm tokens/s", "adapter tokens/s", "cost", "adapter cost"],
    "deterministic": ["batch", "G", "plain tokens/s", "deterministic tokens/s", "cost", "score cost"],
    "distribution": ["what", "batch", "values ms", "laws ms", "ratio"],
    "speculative": [
        "batch",
        "method",
        "G",
        "plain tokens/s",
        "draft tokens/s",
        "below tokens/s",
        "draft ratio",
        "below ratio",
        "block/step",
        "draft step/step",
        "draft accepted",
        "draft tokens/round",
        "below accepted",
        "below tokens/round",
    ],
    "recontrol": [
        "batch",
        "value width",
        "base ms/token",
        "edited ms/token",
        "bare ms/token",
        "cost",
        "overhead",
    ],
    "ggro": [
        "batch",
        "batch s/prompt",
        "alone s/prompt",
        "speed",
        "segments",
        "tokens",
        "scored",
        "gradients",
    ],
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
    "train": ["stage", "rows x length", "jaxalign tokens/s", "jaxalign MB", "GFLOP"],
    "rl": [
        "layers",
        "width",
        "vocabulary",
        "parameters",
        "samples/s",
        "roll-out tokens/s",
        "update tokens/s",
        "share of roll-out",
    ],
    "shaping": ["what", "seconds", "times", "of"],
}
FIRST = {
    "distribution": ["training", "decoding, 3 candidates"],
    "rl": [1],
    "score": ["forward", "gradient"],
    "train": ["sft", "reward_model", "arm"],
    "shaping": [
        "threshold",
        "threshold and gradient",
        "one jnp.sort",
        "sorted-prefix form",
        "numpy, 50 bisections",
        "prefill",
        "prefill with a threshold head",
    ],
}


@pytest.mark.parametrize("name", SIZES)
def test_prints_and_writes_its_rows(name, tmp_path, capsys):
    bench.main([name, *SIZES[name], "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.json"]
    written = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert written.keys() == {"device", "jax", "rows"}
    first = FIRST.get(name, [2])
    assert [row[COLUMNS[name][0]] for row in written["rows"]] == first
    assert [list(row) for row in written["rows"]] == [COLUMNS[name]] * len(first)
    for row in written["rows"]:
        for column, value in row.items():
            # A program may need no buffer, and two results may be equal.
            least = 0 if "temp" in column or column == "max difference" else 1e-12
            assert isinstance(value, str) or value >= least, column
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{name} on ")
    assert len(printed) == len(first) + 3  # the device, the columns, the rows, the path
    for column in COLUMNS[name]:
        assert column in printed[1]


def test_the_leader_s_gradients_are_timed_beside_an_iteration_and_the_implicit_one_counted(tmp_path, capsys):
    sizes = ("--batch", "4", "--samples", "2", "--prompt", "3", "--new", "2", "--candidates", "2", "--vocab", "50")
    bench.main(["bilevel", *SMALL, *sizes, "--horizon", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "bilevel.json").read_text())["rows"]
    assert [list(row) for row in rows] == [["leader", "gradient s", "RLOO s", "ratio"]] * 4
    assert rows[-1]["leader"] == "a reward model, all steps in one pass"
    for row in rows:
        assert row["ratio"] == pytest.approx(row["gradient s"] / row["RLOO s"])
    (row,) = json.loads((tmp_path / "implicit.json").read_text())["rows"]
    assert list(row) == ["parameters", "products", "residual", "relative error"]
    assert 1 <= row["products"] <= 10
    assert row["relative error"] < 0.05
    assert capsys.readouterr().out.startswith("bilevel on ")
    with pytest.raises(ValueError, match=r"samples: expected a divisor >= 2 of the batch of 4, found 3"):
        bench.main(["bilevel", *SMALL, *sizes, "--samples", "3"])
    with pytest.raises(ValueError, match=r"mesh: expected none, found 'data=1'"):
        bench.main(["bilevel", *SMALL, *sizes, "--mesh", "data=1"])


def test_options_come_from_a_file_and_the_command_line_overrides_it(tmp_path):
    values = {"layers": 1, "width": 64, "repeats": 1, "prompt": 3, "new": 2, "batch": [1, 3], "torch": False}
    (tmp_path / "c.json").write_text(json.dumps(values))
    bench.main(["decode", "--config", str(tmp_path / "c.json"), "--batch", "2", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [2, 2]
    assert list(rows[0]) == COLUMNS["decode"]  # of the file: without torch
    (tmp_path / "c.json").write_text(json.dumps(values | {"length": 4}))
    with pytest.raises(ValueError, match=r"config: .* found \['length'\]"):
        bench.main(["decode", "--config", str(tmp_path / "c.json")])


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
        assert re.search(rf"^    {name}\s", printed, re.MULTILINE), name
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
        ("transfer", ("--lookahead", "0"), "lookahead: "),
        ("genarm", ("--mesh", "rows=2"), "mesh"),
        ("genarm", ("--mesh", "data=1000"), "mesh"),
        ("blockwise", ("--candidates", "0"), "candidates"),
        ("blockwise", ("--block", "0"), "block"),
        ("recontrol", ("--steps", "0"), "steps"),
        ("recontrol", ("--times", "0"), "times"),
        ("distribution", ("--support", "1"), "support"),
        ("distribution", ("--k", "-1"), "k: expected"),
        ("ggro", ("--candidates", "0"), "candidates"),
        ("ggro", ("--k", "0"), "k: "),
        ("score", ("--length", "1"), "length"),
        ("score", ("--chunk", "0"), "chunk"),
        ("train", ("--batch", "3"), "batch"),
        ("train", ("--length", "1"), "length"),
        ("shaping", ("--samples", "0"), "samples"),
        ("shaping", ("--gain", "-1"), "gain"),
        ("preset", ("--only", "sft"), "only: expected names of"),
        ("preset", ("--seconds", "0"), "seconds"),
    ],
)
def test_bad_values_are_named(name, extra, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        bench.main([name, *SIZES.get(name, ()), *extra, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


TWO_DEVICES = """
from eval.bench import __main__ as bench
for name, sizes in {sizes!r}.items():
    try:
        bench.main([name, *sizes, "--batch", "3", "--mesh", "data=2"])
    except ValueError as error:
        print(name, error)
bench.main(["score", *{sizes!r}["score"], "--mesh", "data=2"])
"""


def test_a_mesh_shares_each_batch_and_must_divide_it():
    printed = on_devices(TWO_DEVICES.format(sizes=SIZES), 2)
    for name in SIZES:
        # Prompts of shaping and rows of a training step of distribution are shared, too.
        sizes = {"shaping": "(20, 3)", "distribution": "(3, 2)"}.get(name, "(3,)")
        assert f"{name} mesh: expected a divisor of every batch size {sizes}, found 'data=2'" in printed
    assert "score on " in printed  # which compares the numbers of both sides


@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_score_refuses_a_wrong_result(monkeypatch, error):
    right = models.token_log_prob
    monkeypatch.setattr(models, "token_log_prob", lambda *args, **options: right(*args, **options) + error)
    with pytest.raises(RuntimeError, match=r"score forward: expected a difference of at most 0\.0001"):
        score.run(score.Config(batch=2, length=7, vocab=50, layers=1, width=64, repeats=1))


TRAIN = train.Config(batch=2, length=7, layers=1, width=64, repeats=1)


def test_transfer_chooses_the_tokens_of_the_torch_loop(capsys):
    pytest.importorskip("torch")
    sizes = {"batch": (1, 2), "k": 3, "lookahead": 3, "prompt": 4, "new": 3, "layers": 1, "width": 64, "repeats": 1}
    rows = transfer.run(transfer.Config(**sizes))
    columns = [*COLUMNS["transfer"], "torch tokens/s at batch 1", "ratio", "same tokens"]
    assert [list(row) for row in rows] == [columns] * 2
    assert [row["same tokens"] for row in rows] == [1.0, 1.0]


def test_train_agrees_with_torch():
    pytest.importorskip("torch")
    rows = train.run(TRAIN)
    at = COLUMNS["train"].index("jaxalign tokens/s") + 1
    columns = [*COLUMNS["train"][:at], "torch tokens/s", "ratio", *COLUMNS["train"][at:], "max difference"]
    assert [list(row) for row in rows] == [columns] * len(train.LOSSES)


@pytest.mark.parametrize("error", [1e-2, math.nan])
def test_train_refuses_a_wrong_result(monkeypatch, error):
    pytest.importorskip("torch")
    right = losses.language_model
    monkeypatch.setattr(losses, "language_model", lambda *args, **options: right(*args, **options) + error)
    with pytest.raises(RuntimeError, match=r"train sft: expected torch's loss .* after 0 steps"):
        train.run(TRAIN)


GPU = {
    "training.sft": [{"remat": "dots"}, 1, "tokens/s"],
    "training.lora": [{"remat": "full"}, 1, "tokens/s"],
    "decoding.plain": [{"base": "1B"}, 1, "ms/token"],
    "decoding.methods": [{"base": "8B"}, 5, "cost"],
    "decoding.deterministic": [{"base": "1B"}, 1, "cost"],
    "leader.gradient": [{}, 1, "ratio"],
    "attention.forms": [{}, 1, "forward and backward ms"],
}


def told_by_child(capsys, function, options, **more):
    asked = {"function": function, "options": options, "tiny": True, "until": time.time() + 1000} | more
    child.work(json.dumps(asked))
    first, *rest = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first.keys() == {"device", "jax"}
    return rest


@pytest.mark.parametrize("function", GPU)
def test_the_gpu_benchmarks_run_at_toy_size(function, capsys):
    options, count, column = GPU[function]
    found = told_by_child(capsys, function, options)
    assert [line.keys() for line in found] == [{"row"}] * count
    assert all(line["row"][column] > 0 and line["row"]["compile s"] >= 0 for line in found)
    assert {benchmark.function for benchmark in preset.BENCHMARKS.values()} == GPU.keys()


def test_a_gpu_benchmark_begins_no_row_too_late_and_goes_on_after_a_failure(capsys, monkeypatch):
    late = told_by_child(capsys, "attention.forms", {}, until=0)
    assert late == [{"left out": "chunks, 1 x 9"}]
    toy = child.sizes.of(tiny=True)
    monkeypatch.setattr(child.sizes, "of", lambda tiny: toy._replace(attention=((-1, 9), (1, 9))))
    failed, whole = told_by_child(capsys, "attention.forms", {})
    assert failed.keys() == {"failed", "why"}
    assert whole.keys() == {"row"}
    with pytest.raises(ValueError, match="device: expected a GPU"):
        told_by_child(capsys, "attention.forms", {}, tiny=False)


def test_the_gpu_preset_tells_what_failed_and_what_was_left_out(tmp_path, capsys, monkeypatch):
    wrong = preset.Benchmark("training", "training.sft", {"remat": "most"})
    late = preset.Benchmark("attention", "attention.forms", {})
    named = {"wrong": wrong, "attention": late, "late": late}
    monkeypatch.setattr(preset, "BENCHMARKS", named)
    begun, right, now = [], preset._measure, time.time

    def measure(name, *more):
        right(name, *more)
        begun.append(name)

    monkeypatch.setattr(preset, "_measure", measure)
    monkeypatch.setattr(preset.time, "time", lambda: now() + 1000 * (len(begun) == 2))
    with pytest.raises(RuntimeError, match="1 of the benchmarks failed: wrong"):
        bench.main(["--preset", "gpu", "--tiny", "--out", str(tmp_path)])
    assert begun == ["wrong", "attention"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert "remat: expected one of" in written["failed"]["wrong: sft, most"]
    assert written["left out"] == ["late"]
    assert [row["rows x length"] for row in written["parts"]["attention"]] == ["1 x 9"]
    printed = capsys.readouterr().out
    assert "## attention" in printed
    assert "| form | rows x length | forward ms |" in printed
    assert "left out: late" in printed


def test_a_gpu_benchmark_that_runs_on_is_ended_and_told(monkeypatch):
    monkeypatch.setattr(preset, "GRACE", 0.2)
    with pytest.raises(RuntimeError, match="failed: attention"):
        preset.run(preset.Config(seconds=0.1, only=("attention",), tiny=True))

"""Where metrics go beside metrics.jsonl. The libraries of the two services are not installed with the tests: a module
of the same functions takes their place, and notes what it is called with."""

from __future__ import annotations

import json
import sys
import types

import pytest

from jaxalign.training import MetricWriter, logging, options, tracking


@pytest.fixture
def service(monkeypatch, request):
    """A module under the name of a service, and its calls."""
    calls = []
    note = lambda name: lambda *args, **options: calls.append((name, args, options))  # noqa: E731
    run = types.SimpleNamespace(define_metric=note("define_metric"), log=note("log"), finish=note("finish"))
    module = types.ModuleType(request.param)
    module.init = lambda **options: calls.append(("init", (), options)) or run
    module.log, module.finish = note("log"), note("finish")
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return request.param, calls


@pytest.mark.parametrize("service", ["wandb", "trackio"], indirect=True)
def test_a_run_that_goes_on_is_one_run_of_the_service(tmp_path, service):
    track, calls = service
    folder = tmp_path / "runs" / "sft"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"seed": 3}')
    for start in (0, 2):
        with MetricWriter(folder, step=start, track=track) as writer:
            writer.write(start + 1, {"loss": 0.5 - start / 10})
    first, second = (options for name, _, options in calls if name == "init")
    assert first == second
    assert first["project"] == "jaxalign"
    assert first["config"] == {"seed": 3}
    assert first["resume"] == "allow"
    assert first["name"].startswith("runs/sft")
    logged = [(args, options) for name, args, options in calls if name == "log"]
    if track == "wandb":
        assert [args[0] for args, _ in logged] == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 0.3}]
    else:
        assert logged == [(({"loss": 0.5},), {"step": 1}), (({"loss": 0.3},), {"step": 3})]
    assert [name for name, _, _ in calls].count("finish") == 2
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert not (folder / "tensorboard").exists()


@pytest.mark.parametrize("service", ["wandb"], indirect=True)
def test_two_folders_are_two_runs(tmp_path, service):
    track, calls = service
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        MetricWriter(tmp_path / name, step=0, track=track).close()
    first, second = (options for name, _, options in calls if name == "init")
    assert first["id"] != second["id"]


def test_none_leaves_the_lines_alone(tmp_path):
    with MetricWriter(tmp_path, step=0, track="none") as writer:
        writer.write(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_service_that_is_not_installed_is_named_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"track: expected trackio to be installed \(python -m pip install trackio\)"):
        options.check_optimizer_options(options.OptimizerOptions(track="trackio"))
    with pytest.raises(ValueError, match="track: expected tensorboard, wandb, trackio or none, found 'mlflow'"):
        tracking.check_track("mlflow")


def test_lines_of_metrics_that_hold_no_step_are_left_out_and_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 0.5}).encode() for step in range(1, 6)]
    odd = [b"\xff\xfe", b'{"loss": "\xff", "step": 1}', b"[" * 100_000, b'{"step": 1e400}', b'{"step": "2"}', b"[1]"]
    odd += [b'{"step": ' + b"1" * 5000 + b"}", b"\x00\x00", b'{"step": true}']
    path.write_bytes(b"\n".join([good[0], *odd, *good[1:], b'{"step": 6, "lo']))
    with MetricWriter(tmp_path, step=3, track="none") as writer:
        writer.write(4, {"loss": 1.0})
    assert [line["step"] for line in logging.read(path)] == [1, 2, 3, 4]
    assert capsys.readouterr().out == f"metrics.jsonl: 9 lines that hold no step are left out of {path}\n"
    path.write_bytes(b"\n".join([*good, b'{"step": 6, "lo']))  # as a kill leaves it
    MetricWriter(tmp_path, step=9, track="none").close()
    assert [line["step"] for line in logging.read(path)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out == ""
    path.write_bytes(b"\n".join(good))  # a last line without its end that is whole
    MetricWriter(tmp_path, step=9, track="none").close()
    assert [line["step"] for line in logging.read(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", [b"\xff", b"[1]", b'{"step', b"[" * 100_000])
def test_a_line_of_metrics_that_cannot_be_read_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"^metrics.jsonl: expected a JSON object in line 2, found .* in {path}"):
        logging.read(path)

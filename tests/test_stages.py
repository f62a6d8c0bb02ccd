"""The stages of the quickstart: each is a command that parses, reads what stages before it wrote, and is done once."""

from __future__ import annotations

import json
import pathlib
import shutil
import types
import typing

import pytest

from jaxalign import _options, commands, evaluation
from jaxalign.evaluation import runs
from jaxalign.launch import real_stages, stages
from train import quickstart

SHARED = {"seed": 0, "dtype": "float32", "mesh": ""}
PRESETS = [(source, preset) for source in (stages, real_stages) for preset in sorted(source.SIZES)]
each_preset = pytest.mark.parametrize(("source", "preset"), PRESETS, ids=[preset for _, preset in PRESETS])


def strings(options: dict) -> list[str]:
    return [value for value in options.values() if isinstance(value, str)]


@each_preset
def test_each_stage_reads_the_folders_of_stages_before_it(source, preset, tmp_path):
    done: set[str] = set()
    for stage in source.training_stages(tmp_path, preset, SHARED):
        out = pathlib.Path(stage.options["out"])
        read = [pathlib.Path(word).relative_to(tmp_path).parts[0] for word in strings(stage.options) if "/" in word]
        assert {name for name in read if name != out.name} <= done, stage.title
        assert out.name not in done
        done.add(out.name)
    for methods in source.decoding_groups(tmp_path, preset).values():
        for method in methods:
            folders = [part for part in method.partition("@")[0].split(":") if "/" in part]
            assert {pathlib.Path(folder).relative_to(tmp_path).parts[0] for folder in folders} <= done
    decoded = strings(source.decode_options(tmp_path, preset, SHARED))
    assert {pathlib.Path(w).relative_to(tmp_path).parts[0] for w in decoded if "/" in w} <= done | {"decode"}


@each_preset
def test_the_command_of_each_stage_parses_with_its_scripts_parser(source, preset, tmp_path):
    for stage in source.training_stages(tmp_path, preset, SHARED):
        config = commands.load(stage.job).Config
        words: list[str] = []
        for name, value in stage.options.items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(option if value else f"--no-{name.replace('_', '-')}")
            else:
                words += [option, str(value)]
        parsed = _options.parse(config, description="", args=words, prog=stage.job)
        assert parsed == commands.from_fields(config, stage.options)
        assert {name: _options.flat(parsed)[name] for name in stage.options} == stage.options
    for methods in source.decoding_groups(tmp_path, preset).values():
        options = evaluation.DecodeOptions(**source.decode_options(tmp_path, preset, SHARED), method=methods)
        assert len(runs.check(options)) == len(methods) + (not any(m.startswith("base") for m in methods))


def test_presets_of_the_quickstart_are_those_that_have_sizes():
    names = typing.get_args(typing.get_type_hints(quickstart.Config)["preset"])
    assert sorted(names) == sorted(preset for _, preset in PRESETS)


def test_a_smaller_preset_says_what_it_leaves_out():
    assert real_stages.left_out("smollm2") == []
    for preset, size in real_stages.SIZES.items():
        decoded = " ".join(m for ms in real_stages.decoding_groups(pathlib.Path("x"), preset).values() for m in ms)
        for name in real_stages.left_out(preset):
            assert f"{name}:" not in decoded
        assert {*size.strengths, *real_stages.left_out(preset)} == set(real_stages.SIZES["smollm2"].strengths)


def test_finished_stages_are_reported_and_not_run_again(tmp_path, capsys):
    """There are no models to run them on."""
    for number, stage in enumerate(stages.training_stages(tmp_path, "tiny", SHARED)):
        if stage.job == "world":
            continue
        out = pathlib.Path(stage.options["out"])
        out.mkdir()
        options = _options.flat(commands.from_fields(commands.load(stage.job).Config, stage.options))
        if stage.job == "value":
            options["model"] = options["base"]
        (out / "config.json").write_text(json.dumps(options))
        (out / "summary.json").write_text(json.dumps({"number": number}))
        product = out / ("." if stage.job in ("calibrate", "preferences") else "model")
        product.mkdir(exist_ok=True)
        whole = {"calibrate": ("table.npz", "table.json"), "preferences": ("pairs.jsonl",)}
        for name in whole.get(stage.job, ("config.json", "model.safetensors")):  # a finished run has its product
            (product / name).touch()
        capsys.readouterr()
        assert commands.run(stage.job, **stage.options) == {"number": number}
        assert f"number: {number}" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"^seed: expected 0 of the run .*, found 1"):
            commands.run(stage.job, **(stage.options | {"seed": 1}))
        shutil.rmtree(out)  # a later stage began with no such files


def test_the_quickstart_runs_its_stages_in_order_and_the_world_once(tmp_path, monkeypatch, capsys):
    run: list[str] = []
    reports: list[pathlib.Path] = []

    def record(job: str, **options) -> None:
        if job == "report":
            assert options["runs"] == [str(tmp_path)]
            reports.append(pathlib.Path(options["out"]))
            return
        run.append(pathlib.Path(options["out"]).name)
        pathlib.Path(options["out"]).mkdir(exist_ok=True)

    monkeypatch.setattr(quickstart.commands, "run", record)
    monkeypatch.setattr(quickstart.evaluation, "run", lambda *_, **__: [])
    monkeypatch.setattr(quickstart.plots, "frontier", lambda *_: None)
    monkeypatch.setattr(quickstart.results, "print_table", lambda _: None)
    config = quickstart.Config(out=str(tmp_path), preset="tiny")
    every = [pathlib.Path(s.options["out"]).name for s in stages.training_stages(tmp_path, "tiny", SHARED)]
    for expected in (every, every[1:]):
        run.clear()
        found = quickstart.run(config)
        assert run == expected
    assert reports == [tmp_path / "report.html"] * 2
    titles = {stage.title for stage in stages.training_stages(tmp_path, "tiny", SHARED)}
    assert titles < set(found["seconds"])
    assert f"[1/{len(titles) + len(stages.decoding_groups(tmp_path, 'tiny'))}]" in capsys.readouterr().out


@pytest.mark.parametrize("library", ["there", "none", "another"])
def test_a_stage_is_timed_and_gives_back_freed_memory_where_the_c_library_can(library, tmp_path, monkeypatch):
    trims = []

    def load(_: None):
        if library == "none":
            raise OSError
        return types.SimpleNamespace(**({"malloc_trim": trims.append} if library == "there" else {}))

    monkeypatch.setattr(stages.ctypes, "CDLL", load)
    clock = stages.Clock(tmp_path / "timings.json")
    with pytest.raises(KeyError), clock.stage("one"):
        raise KeyError
    with clock.stage("one"):
        pass
    assert trims == ([0, 0] if library == "there" else [])
    assert stages.Clock(tmp_path / "timings.json").seconds == clock.seconds == {"one": clock.seconds["one"]}

"""The files of train/presets: what they name, and a dry run of each on shapes alone."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from jaxalign import commands
from tests.conftest import on_devices
from tests.presets_program import PRESETS, job_of
from train import dpo, sft

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
DEVICES = 8


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("presets")
    print(on_devices(f"from tests import presets_program; presets_program.main({str(folder)!r}, {NAMES!r})", DEVICES))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_compiles_on_its_mesh(told, name):
    found = json.loads((told / f"{name}.json").read_text())
    assert "error" not in found, found
    assert found["devices"] == DEVICES
    assert (found["parameters"] > 0) == (job_of(name) != "decode")
    assert (found["frozen"] > 0) == (job_of(name) in ("decode", "arm", "dpo") or name.endswith("lora"))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_its_command_and_its_devices(name):
    path = PRESETS / f"{name}.toml"
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    package = "eval" if job_of(name) == "decode" else "train"
    assert f"#   python -m {package}.{job_of(name)} --config preset:{name}" in comments
    assert any(line.startswith("# For the eight 80 GB GPUs") for line in comments)
    for other in re.findall(r"preset:(\w+)|(\w+)\.toml", path.read_text()):
        assert (PRESETS / f"{''.join(other)}.toml").is_file(), other


def test_a_preset_is_read_by_its_name_and_the_command_line_comes_first():
    parse = lambda *args: commands.parse(sft.Config, description="", args=args)  # noqa: E731
    found = parse("--config", "preset:sft_llama_hh", "--mesh", "data=1")
    assert (found.mesh.mesh, found.mesh.remat, found.run.out) == ("data=1", "full", "runs/llama_hh/sft")
    assert found.run.config == "preset:sft_llama_hh"
    assert parse("--config", str(PRESETS / "sft_llama_hh.toml")).model == found.model


def test_a_preset_of_another_job_is_refused_with_those_that_there_are():
    for name in ("sft_llama_hh", "none"):
        with pytest.raises(ValueError, match=rf"^config: expected one of dpo_llama_hh for dpo, found preset:{name}$"):
            commands.parse(dpo.Config, description="", args=["--config", f"preset:{name}"])

"""Meshes that a job's rows or models do not fit: each is one line that names what, before weights are read or made."""

from __future__ import annotations

import importlib
import json
import re

import pytest

from jaxalign import _options, commands
from tests.bad_meshes import LINES, faults
from tests.conftest import on_devices


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bad")
    on_devices(f"from tests import bad_meshes; bad_meshes.main({str(folder)!r})", 8)
    return json.loads((folder / "found.json").read_text())


def test_every_job_with_a_mesh_is_asked_for_bad_ones():
    """Studies have no --mesh and run on one device."""
    found = set()
    for group in ("train", "eval", "eval.studies"):
        for name in commands.jobs(group):
            config = getattr(importlib.import_module(f"{group}.{name}"), "Config", None)  # a group of jobs has none
            if config is not None and "mesh" in _options._options(config):
                found.add(name)
    assert found == set(LINES) | {"quickstart"}  # which is made of such jobs


@pytest.mark.parametrize("job", LINES)
def test_a_mesh_that_does_not_fit_is_one_line_before_anything_is_allocated(found, job):
    wrong = {}
    for name, fault in faults(job).items():
        told = found[job][name]
        if not re.fullmatch(rf"(?:{fault.error}).*", told) or "(wrote" in told:
            wrong[name] = told
    assert not wrong

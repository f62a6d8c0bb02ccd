"""Meshes that a job's rows or models do not fit: each is one line that names what, before weights are read or made."""

from __future__ import annotations

import json
import re

import pytest

from tests.bad_meshes import LINES, faults
from tests.conftest import on_devices


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bad")
    on_devices(f"from tests import bad_meshes; bad_meshes.main({str(folder)!r})", 8)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("job", LINES)
def test_a_mesh_that_does_not_fit_is_one_line_before_anything_is_allocated(found, job):
    wrong = {}
    for name, fault in faults(job).items():
        told = found[job][name]
        if not re.fullmatch(rf"(?:{fault.error}).*", told) or "(wrote" in told:
            wrong[name] = told
    assert not wrong

"""Every family on meshes of eight simulated devices: the numbers of one."""

from __future__ import annotations

import json

import pytest

from tests.conftest import needs_jit, on_devices
from tests.models import families

NAMES = ["llama", "mistral", "qwen2", "qwen3", *(name for name in families.FURTHER if not name.startswith("llama"))]


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, str]:
    """Name -> what went wrong, of all in one process."""
    out = tmp_path_factory.mktemp("meshes") / "errors.json"
    on_devices(f"from tests.models import on_meshes; on_meshes.main({NAMES!r}, {str(out)!r})", 8)
    return json.loads(out.read_text())


@needs_jit
@pytest.mark.parametrize("name", NAMES)
def test_a_family_on_a_mesh_gives_the_logits_of_one_device(name, errors):
    assert not errors[name], errors[name]

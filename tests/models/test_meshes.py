"""Every family on meshes of eight simulated devices: the numbers of one."""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest

from jaxalign.models import sharding
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


def test_heads_that_do_not_divide_are_told_once_whatever_holds_them(capsys):
    """Weights, both moments and the cache of each layer are of one size."""
    sharding._tell_once.cache_clear()
    mesh: Any = jax.sharding.AbstractMesh((8,), ("tensor",))
    kernel, cache = "transformer/layer_{}/attention/qkv/kernel", "layers/{}/{}"
    for layer in range(3):
        for before in ("", "opt_state/mu/", "opt_state/nu/"):
            sharding.partition_spec(before + kernel.format(layer), (16, 4, 6, 8), mesh)
        for name in "kv":
            sharding.partition_spec(cache.format(layer, name), (8, 4, 12, 8), mesh)
    told = "mesh: kv_heads of size {} does not divide over tensor=8: replicated\n"
    assert capsys.readouterr().out == told.format(4)
    sharding.partition_spec(kernel.format(0), (16, 2, 6, 8), mesh)
    assert capsys.readouterr().out == told.format(2)

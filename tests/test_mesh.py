"""Meshes of eight simulated devices: the numbers of one."""

from __future__ import annotations

from tests.conftest import needs_jit, on_devices


@needs_jit
def test_a_model_on_a_mesh_gives_the_numbers_of_one_device():
    on_devices("from tests import on_mesh; on_mesh.main()", 8)

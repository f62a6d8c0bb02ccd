"""Jobs on meshes of eight simulated devices give what they give on one."""

from __future__ import annotations

import pathlib

from tests import mesh_jobs
from tests.conftest import needs_jit, on_devices
from tests.on_mesh import MESHES


@needs_jit
def test_jobs_give_the_figures_weights_and_responses_of_one_device(tmp_path):
    on_devices(f"from tests import mesh_jobs; mesh_jobs.main({str(tmp_path)!r})", 8)


def test_every_job_runs_on_a_mesh_of_all_axes_and_every_mesh_has_jobs_that_train_and_draw():
    assert set(mesh_jobs.MESHES_OF) == set(mesh_jobs.commands(pathlib.Path()))
    assert all(mesh_jobs.EACH in meshes for meshes in mesh_jobs.MESHES_OF.values())
    for mesh in MESHES:
        of = {job for job, meshes in mesh_jobs.MESHES_OF.items() if mesh in meshes}
        assert of & {"sft", "reward_model", "arm", "dpo"}
        assert of & {"value", "rl", "calibrate", "decode"}

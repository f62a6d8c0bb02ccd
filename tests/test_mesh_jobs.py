"""Jobs on meshes of eight simulated devices give what they give on one."""

from __future__ import annotations

from tests.conftest import needs_jit, on_devices


@needs_jit
def test_jobs_give_the_figures_weights_and_responses_of_one_device(tmp_path):
    on_devices(f"from tests import mesh_jobs; mesh_jobs.main({str(tmp_path)!r})", 8)

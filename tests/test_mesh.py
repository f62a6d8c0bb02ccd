"""Meshes of eight simulated devices: the numbers of one."""

from __future__ import annotations

import pathlib

import jax
import pytest

from jaxalign import models
from tests.conftest import needs_jit, on_devices, tiny_config


@needs_jit
def test_a_model_on_a_mesh_gives_the_numbers_of_one_device():
    on_devices("from tests import on_mesh; on_mesh.main()", 8)


@needs_jit
def test_decoders_that_keep_drop_and_propose_rows_give_on_a_mesh_what_they_give_on_one_device():
    on_devices("from tests import decoders_on_mesh; decoders_on_mesh.main()", 8)


@needs_jit
def test_temporaries_of_steps_on_frozen_weights_do_not_grow_by_the_layers_matrices():
    on_devices("from tests import on_layers; on_layers.main()", 8)


@needs_jit
def test_steps_over_tokens_put_each_matrix_together_in_their_loop():
    on_devices("from tests import on_tokens; on_tokens.main()", 8)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_a_model_is_read_and_written_without_a_second_copy_on_the_host(tmp_path):
    sizes = {"vocab_size": 16384, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 8, "head_dim": 64}
    lm = models.LanguageModel(tiny_config(**sizes, intermediate_size=4096, num_layers=1), "bfloat16")
    models.save(tmp_path / "model", lm, lm.init(jax.random.key(0)))
    on_devices(f"from tests import on_mesh; on_mesh.check_peak({str(tmp_path / 'model')!r}, 'fsdp=4,tensor=2')", 8)

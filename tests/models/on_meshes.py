"""Every family of models on meshes of eight simulated devices beside one device: run as a process of its own by
test_meshes.py."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import pathlib
import tempfile
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tests.conftest  # noqa: F401  # the flags and the cache of compiled programs
from jaxalign import models
from jaxalign.models import sharding
from tests.models.make_golden import GOLDEN

MESHES = ("fsdp=8", "tensor=2", "data=2,fsdp=2,tensor=2")
TOKENS = jax.random.randint(jax.random.key(1), (8, 7), 3, 64)
MASK = jnp.arange(6) >= jnp.array([0, 2, 1, 0, 3, 0, 0, 1])[:, None]


@functools.partial(jax.jit, static_argnums=0)
def read(lm: models.LanguageModel, params: Any, tokens: Any) -> Any:
    """Logits after left-padded prompts of 6 tokens, and after one token more."""
    hidden, cache = lm.prefill(params, tokens[:, :6], MASK, 8)
    return lm.logits(params, hidden), lm.logits(params, lm.step(params, cache, tokens[:, 6])[0])


def check(name: str) -> None:
    """Logits of a prefill and a step equal one device's; a folder is read into shards, and written from them."""
    config = dataclasses.replace(models.read_config(GOLDEN / name), vocab_size=64)
    alone = models.LanguageModel(config)
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, jax.jit(alone.init)(jax.random.key(0)))
    expected = read(alone, params, TOKENS)
    assert all(np.isfinite(logits).all() and np.std(logits) > 1e-2 for logits in expected)
    with tempfile.TemporaryDirectory() as folder:
        models.save(f"{folder}/one", alone, params)
        for spec in MESHES:
            mesh = sharding.make_mesh(spec)
            lm, placed = models.load(f"{folder}/one", mesh=mesh)
            assert lm == models.LanguageModel(config, mesh=mesh), spec
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), placed, params)
            assert any(not x.is_fully_replicated for x in jax.tree.leaves(placed))
            models.save(f"{folder}/again", lm, placed, overwrite=True)
            files = [pathlib.Path(folder, run, "model.safetensors").read_bytes() for run in ("one", "again")]
            assert files[0] == files[1], spec
            if spec != MESHES[-1]:  # which divides along every axis; each program takes a second to compile
                continue
            found = read(lm, placed, jax.device_put(TOKENS, sharding.batch_sharding(mesh)))
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * float(np.abs(y).max()), err_msg=spec)


def main(names: list[str], out: str) -> None:
    """Writes name -> what went wrong, "" where nothing did."""
    gc.disable()  # a tenth of the time; the process is short
    found = {}
    for name in names:
        try:
            check(name)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
    pathlib.Path(out).write_text(json.dumps(found))

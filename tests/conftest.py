"""Fixtures shared by the tests: a tiny language model of each head, and prompts under both paddings."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import importlib.metadata
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

# Before jax starts: the tests compile much and compute little. One piece for each program halves the memory maps; the
# older generator of fused loops compiles twice as fast, but newer versions end at a flag that they do not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith(("0.8", "0.9", "0.10.")),
)

import jax
import numpy as np
import pytest

from jaxalign import models
from jaxalign.types import TokenBatch

# One cache of compiled programs for a run of the tests, shared by its workers and gone with it.
if "JAXALIGN_TEST_CACHE" not in os.environ:
    os.environ["JAXALIGN_TEST_CACHE"] = tempfile.mkdtemp(prefix="jaxalign-tests-")
    atexit.register(shutil.rmtree, os.environ["JAXALIGN_TEST_CACHE"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAXALIGN_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tracing makes many small objects and few circles: collections at the usual 700 of them take some per cent of the time.
gc.set_threshold(50_000, 20, 50)

needs_jit = pytest.mark.skipif(
    jax.config.jax_disable_jit, reason="counts traces or reads a compiled program, and jit is off"
)


@pytest.fixture(autouse=True)
def _free_programs():
    """Each compiled program holds memory maps, of which Linux gives a process 65,530: past that, jax crashes. So the
    programs of earlier tests go when they hold a sixth of that, which is some gigabytes (those on disk stay)."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 11_000:
        jax.clear_caches()


def on_devices(program: str, count: int = 4, *, flags: str = "") -> str:
    """What a program prints on that many simulated devices, with further flags of XLA. A process of its own: their
    number is fixed when jax starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count} {flags}"
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


VOCAB = 11
EOS = (0,)


def tiny_config(head: models.Head | None = None, **changes) -> models.Config:
    """Two layers of width 16 over 11 tokens, in float64 unless told otherwise."""
    config = models.Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_length=64,
        eos_ids=EOS,
        head=head,
    )
    return dataclasses.replace(config, **changes)


@functools.cache
def tiny_lm(seed: int = 0, head: str | None = None, dtype: str = "float32", **changes):
    """(lm, params) with weights large enough that the next-token distribution is far from uniform."""
    if head == "reward":
        spec = models.Head("reward")
    elif head is not None:
        spec = models.Head(head, hidden_size=12)
    else:
        spec = None
    lm = models.LanguageModel(tiny_config(spec, **changes), dtype=dtype)
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, lm.init(jax.random.key(seed)))
    return lm, params


def padded(rows: list[list[int]], *, side: str = "left", extra: int = 0) -> TokenBatch:
    """Prompts of unequal length as one batch, with `extra` more pads; pads hold a real token id on purpose."""
    width = max(map(len, rows)) + extra
    tokens = np.full((len(rows), width), 3, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for b, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[b, at], mask[b, at] = row, True
    return TokenBatch(jax.numpy.asarray(tokens), jax.numpy.asarray(mask))


@functools.partial(jax.jit, static_argnums=0)
def forward(lm: models.LanguageModel, params, tokens, mask=None) -> models.ModelOutput:
    """`lm.apply`, compiled once for each model and shape: op by op it is a program for every operation."""
    return lm.apply(params, tokens, mask=mask)


def alone(lm: models.LanguageModel, params, row: list[int]):
    """One text on its own, right-padded to a fixed width so that all texts share a program: its real positions."""
    batch = padded([row], side="right", extra=12 - len(row))
    return jax.tree.map(lambda x: np.asarray(x)[0, : len(row)], forward(lm, params, batch.tokens, batch.mask))


PROMPTS = [[4, 5, 6], [7], [8, 9], [1, 2, 10, 4], [5, 5]]


@pytest.fixture
def prompts() -> TokenBatch:
    return padded(PROMPTS)


@pytest.fixture
def default_signals():
    """The signals end this process and those that it starts. Where the tests were started with nohup or in the
    background, HUP or INT is ignored, which their children inherit."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)

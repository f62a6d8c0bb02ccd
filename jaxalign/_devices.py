"""The devices that programs are made for: those that are there, or described ones that a dry run compiles for."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax

VARIABLE = "JAXALIGN_TOPOLOGY"
"""Environment variable of a process that compiles for described devices: "v5e:4x4" or another name of libtpu's."""


def every() -> list[Any]:
    """The devices of a mesh: jax's, or those of the topology that this process compiles for."""
    name = os.environ.get(VARIABLE, "")
    return list(_described(name)) if name else jax.devices()


def backend() -> str:
    """The platform that programs are compiled for: "cpu", "gpu" or "tpu"."""
    return "tpu" if os.environ.get(VARIABLE) else jax.default_backend()


def flattens_scatters() -> bool:
    """Whether scatters are counted in one number here, by which a place past the end of a row is the next row's first.

    XLA does so on a GPU where its flags ask for results that are the same in every run (seen in jax 0.11: tokens past a
    prompt's end were written into the prompt after it). `_arrays.write` names such places otherwise then.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    return backend() == "gpu" and any(flag in (name, f"{name}=true", f"{name}=1") for flag in flags for name in names)


def memory() -> int | None:
    """Memory of an accelerator [bytes], as jax says it; None on a CPU, where it is not known, and of devices that are
    described alone."""
    if backend() == "cpu" or os.environ.get(VARIABLE):
        return None
    found = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if found is None else int(found)


def environment(topology: str) -> dict[str, str]:
    """The variables of a process that compiles for a topology.

    Raises:
      ValueError: the package libtpu, which holds the compiler, is not installed.
    """
    try:
        import libtpu
    except ImportError as error:
        raise ValueError(
            f"topology: expected the TPU's compiler for {topology!r}, which is pip install 'jaxalign[topology]', found "
            "no package libtpu"
        ) from error
    path: str = libtpu.get_library_path()
    known = {"TPU_LIBRARY_PATH": path, "TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3"}
    return known | {VARIABLE: topology, "JAX_PLATFORMS": "cpu"}


@functools.cache
def _described(name: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        words = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(f"topology: expected a name of libtpu's, as in v5e:4x4, found {name!r} ({words})") from error

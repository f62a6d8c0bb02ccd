"""What a training step needs, compiled on shapes alone: no weights are read and nothing is placed on a device."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, TypeVarTuple, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _devices, _options, models
from jaxalign.models import sharding
from jaxalign.training.step import TrainState, TrainStep
from jaxalign.types import Params

CARDS = (80, 96, 141)
"""Memory of the devices that are named [GB]."""

AS_ACCELERATORS: dict[str, bool | str] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}
"""Options of the CPU's compiler, of which `cpu_options` gives those that it has. Left to itself it begins all at once
that waits for nothing, such as copies of every layer's weights and the zeros that sums begin with; a GPU's and a TPU's
order a program by the memory that it takes. It multiplies bfloat16 in float32, and would make such copies of all
matrices ahead of a loop over tokens, which other devices do not need. The last three leave machine code as it comes,
which nothing runs: buffers are planned before it is written."""

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class Estimate(NamedTuple):
    """What a step needs on each device, by its compiled program."""

    devices: int
    """Number of devices."""
    parameters: int
    """What is trained [bytes]."""
    optimizer: int
    """The optimizer's state [bytes]."""
    frozen: int
    """Parameters that are not trained [bytes]."""
    temporaries: int
    """Activations, gradients and all else that lives inside the step [bytes]."""
    total: int
    """The most that is held at a time, batch and results included [bytes]."""
    flops_per_token: float
    """Operations of all devices for each token of the batch, by formula (`flops.counter`): the compiler counts the body
    of a loop once, however often it runs."""
    tokens: int
    """Tokens of the batch, pads included."""

    def fits(self, gigabytes: float) -> bool:
        """Whether a card of that much memory [GB] holds it; a twentieth is left to the runtime."""
        return self.total <= 0.95e9 * gigabytes


class Told(SystemExit):
    """A dry run has been told and ends with exit code 0; `estimate` holds its figures."""

    def __init__(self, estimate: Estimate | None = None) -> None:
        super().__init__(0)
        self.estimate = estimate


def is_abstract(tree: Any) -> bool:
    """Whether a tree holds shapes (jax.ShapeDtypeStruct) in place of arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def apply(f: Callable[[Unpack[Arguments]], T], *args: *Arguments) -> T:
    """f(*args), or its shapes where the arguments hold shapes in place of arrays."""
    if not is_abstract(args):
        return f(*args)
    shapes: T = jax.eval_shape(f, *args)
    return shapes


def abstract(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """The shapes of parameters or a state, each where `sharding.shard(tree, mesh, others=True)` would put it."""
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)
    places = sharding.placements(tree, mesh, others=True)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=place), tree, places
    )


def load_shapes(path: str, *, dtype: str = "float32") -> tuple[models.LanguageModel, Params]:
    """The model of a folder and the shapes of its parameters, of its configs alone."""
    lm = models.LanguageModel(models.read_config(path), dtype)
    return lm, jax.eval_shape(lm.init, jax.random.key(0))


def rows_of_batch(rows: Sequence[Any], size: int) -> list[Any]:
    """The rows of the largest batch: the longest ones, over and over where there are fewer than `size`."""
    longest = sorted(rows, key=_length, reverse=True)[:size]
    return [longest[i % len(longest)] for i in range(size)]


def _length(row: Any) -> int:
    """Numbers in a row: of its token lists and what it is nested of."""
    return sum(map(_length, row)) if isinstance(row, list | tuple) else 1


def estimate(
    step: TrainStep,
    state: TrainState,
    batch: Any,
    frozen: Params,
    *,
    mesh: jax.sharding.Mesh | None,
    flops: float,
    beside: Params = None,
) -> Estimate:
    """Compiles a step and reads what it needs of the compiled program.

    Args:
      step: as `train_step` makes it.
      state, frozen: arrays or their shapes.
      batch: leaves [A,b,...].
      mesh: of devices that they would lie on.
      flops: operations of the step.
      beside: parameters that the devices hold and the step does not read; they count as frozen.

    Returns:
      The figures of one device.
    """
    state, frozen, beside = abstract((state, frozen, beside), mesh)
    rows = None if mesh is None else sharding.batch_sharding(mesh, ahead=1)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=rows), batch)
    memory = cast(Any, planned(cast(Any, step).lower(state, given, frozen)).memory_analysis())
    devices = 1 if mesh is None else mesh.size
    tokens = sum(math.prod(x.shape) for x in _tokens(given))
    # The compiler's own count leaves out those that the step does not read.
    arguments = bytes_of((state, given, frozen, beside))
    total = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Estimate(
        devices=devices,
        parameters=bytes_of(state.params),
        optimizer=bytes_of(state.opt_state),
        frozen=bytes_of((frozen, beside)),
        temporaries=memory.temp_size_in_bytes,
        total=total + memory.temp_size_in_bytes,
        flops_per_token=flops / max(tokens, 1),
        tokens=tokens,
    )


def planned(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """A program compiled for its memory_analysis: on a CPU as an accelerator's compiler orders it
    (`AS_ACCELERATORS`)."""
    return lowered.compile(compiler_options=cpu_options() if _devices.backend() == "cpu" else None)


@functools.cache
def cpu_options() -> dict[str, bool | str]:
    """Those of `AS_ACCELERATORS` that the installed compiler has: some came, and some went, between its versions."""
    nothing = jax.jit(lambda: jnp.zeros(())).lower()

    def is_known(option: dict[str, bool | str]) -> bool:
        try:
            nothing.compile(compiler_options=option)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return {name: value for name, value in AS_ACCELERATORS.items() if is_known({name: value})}


def held(program: Any, *args: Any) -> int:
    """The most bytes that each device holds while a compiled function runs on such arguments, arrays or shapes, also
    those that it does not read."""
    compiled: Any = planned(program.lower(*args))
    return bytes_held(compiled) - int(compiled.memory_analysis().argument_size_in_bytes) + bytes_of(args)


def bytes_held(compiled: Any) -> int:
    """The most bytes that each device holds while a compiled program runs, by the compiler's plan: arguments, results
    that do not take their place, and temporaries."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return int(sum(sizes) - memory.alias_size_in_bytes)


def _tokens(batch: Any) -> list[Any]:
    """The leaves that hold token ids."""
    named = jax.tree_util.tree_leaves_with_path(batch)
    return [x for path, x in named if "tokens" in str(getattr(path[-1], "key", ""))]


def bytes_of(tree: Any) -> int:
    """The bytes of a tree of shapes or arrays on one device."""

    def own(x: Any) -> int:
        shape = x.shape if getattr(x, "sharding", None) is None else x.sharding.shard_shape(x.shape)
        return int(math.prod(shape) * x.dtype.itemsize)

    return sum(own(x) for x in jax.tree.leaves(tree))


def tell(stage: str, found: Estimate, *, memory: float = 0.0) -> None:
    """Prints the figures.

    Args:
      stage: name of the training.
      found: its figures.
      memory: of a device [GB], of which it is said whether it is enough; 0 for those of `CARDS`.

    Raises:
      Told: always, since a dry run ends here.
    """
    kind = _devices.every()[0].device_kind
    parts = [(name, getattr(found, name)) for name in ("parameters", "optimizer", "frozen")]
    lines = [
        f"{stage}: an estimate, by the program compiled for {found.devices} of {kind}; per device:",
        *(f"  {name}: {size / 1e9:.4g} GB" for name, size in parts),
        f"  temporaries (activations, gradients): {found.temporaries / 1e9:.4g} GB",
        f"  in all: {found.total / 1e9:.4g} GB",
        f"per token, of {found.tokens}: {found.flops_per_token / 1e9:.4g} GFLOP, by formula",
        fitting(found, memory),
    ]
    print("\n".join(lines), flush=True)
    raise Told(found)


def fitting(found: Estimate, memory: float = 0.0) -> str:
    """Says whether figures fit a device.

    Args:
      found: the figures.
      memory: of the device [GB]; 0 for those of `CARDS`.

    Returns:
      "fits 80 GB, ...", "does not fit 80 GB, ...".
    """
    sizes = (memory,) if memory else CARDS
    return ", ".join(f"{'fits' if found.fits(size) else 'does not fit'} {size:g} GB" for size in sizes)


def on_enough_devices(config: Any, mesh: str) -> None:
    """Runs the job in a process of its own where there are fewer devices than a mesh has, or --topology describes some.

    Args:
      config: of a job that is a module of train/.
      mesh: as `sharding.make_mesh` reads it.

    Raises:
      Told: the other process has told the figures.
      ValueError: a topology without a mesh or without its compiler; what the other process found wrong.
    """
    topology = str(_options.flat(config).get("topology", ""))
    sizes = [part.partition("=")[2].strip() for part in mesh.split(",") if part]
    needed = math.prod(int(size) for size in sizes if size.isdecimal())
    if topology and not mesh:
        raise ValueError(f"topology: expected with --mesh, as in data=-1, found {topology!r} alone")
    if os.environ.get(_devices.VARIABLE) if topology else needed <= len(jax.devices()):
        return
    options = json.dumps(_options.flat(config))
    program = "import json, sys; from jaxalign import commands; commands.run(sys.argv[1], **json.loads(sys.argv[2]))"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={needed}"
    simulated = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", program, _options.job_of(type(config)), options],
        env=os.environ | (_devices.environment(topology) if topology else simulated),
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise ValueError(found.stderr.strip().rpartition("\n")[2].removeprefix("ValueError: "))
    print(found.stdout, end="", flush=True)
    raise Told

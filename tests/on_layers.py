"""Temporaries of steps on frozen weights that are split over eight simulated devices, by the number of layers: run as a
process of its own by test_mesh.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import models, training
from jaxalign.models import sharding
from jaxalign.training import adapters, dry_run, objectives
from tests.on_mesh import CONFIG

SIZES = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "max_length": 64}
ROWS, LENGTH = 8, 64
SPEC = models.Lora(2)


def steps(layers: int) -> dict[str, tuple[Any, Any]]:
    """Name -> (program, its arguments) of a model of that many layers."""
    mesh = sharding.make_mesh("fsdp=8")
    config = dataclasses.replace(CONFIG, num_layers=layers, **SIZES)
    heads = {"none": None, "value": models.Head("value", hidden_size=8)}
    lms = {
        name: models.LanguageModel(dataclasses.replace(config, head=head), "bfloat16", mesh, "full")
        for name, head in heads.items()
    }
    params = {name: jax.eval_shape(lm.init, jax.random.key(0)) for name, lm in lms.items()}
    adapter = jax.eval_shape(lambda: models.lora.init(jax.random.key(1), models.LanguageModel(config), SPEC))
    update, _ = training.adamw(learning_rate=1e-3, steps=4)
    texts = {"tokens": jnp.int32, "mask": bool, "loss_mask": bool}
    rows = {name: jax.ShapeDtypeStruct((1, ROWS, LENGTH), kind) for name, kind in texts.items()}
    pairs = {"chosen": rows, "rejected": rows}
    rewarded = rows | {"reward": jax.ShapeDtypeStruct((1, ROWS), jnp.float32)}
    value = objectives.value(lms["value"], "td", before=True)

    def of_head(trained: Any, batch: Any, frozen: Any) -> Any:
        return value({**frozen, **trained}, batch, None)

    given = {
        "dpo of an adapter": (adapters.with_adapter(objectives.dpo(lms["none"], beta=0.1), SPEC), adapter, pairs),
        "a head": (of_head, {"head": params["value"]["head"]}, rewarded),
    }
    found = {}
    for name, (loss, trained, batch) in given.items():
        state = dry_run.abstract(jax.eval_shape(lambda p: training.create(p, update), trained), mesh)
        frozen = dry_run.abstract({"transformer": params["none"]["transformer"]}, mesh)
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh, ahead=1)), batch
        )
        found[name] = training.train_step(loss, update, mesh=mesh), (state, placed, frozen)
    return found


def main() -> None:
    """Two more layers take the inputs of each, and their shares of the adapter's gradients: less than a quarter of the
    matrices of one in bfloat16. Also in the order of a CPU's own, which begins all at once that waits for nothing."""
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    matrices = 2 * (3 * width * inner + width * 64 + width * (64 + 2 * 32))
    few, many = steps(2), steps(4)
    for name in few:
        for plan in (dry_run.planned, lambda lowered: lowered.compile()):
            programs = [plan(step.lower(*args)) for step, args in (few[name], many[name])]
            sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
            print(f"{name}: {sizes} of temporaries; matrices {matrices}")
            assert sizes[1] - sizes[0] < matrices / 4, (name, sizes, matrices)

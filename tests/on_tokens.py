"""Where decoding puts weights together that are split over eight simulated devices: run as a process of its own by
test_mesh.py."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxalign import _devices, critics, decoding, models, policies
from jaxalign.models import sharding
from jaxalign.training import dry_run
from jaxalign.types import TokenBatch
from tests.on_layers import SIZES
from tests.on_mesh import CONFIG, GATHER

ROWS, BOTH = 8, "fsdp=4,tensor=2"
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(r"\b(\w+)=\{?%?([\w.\-]+(?:, %[\w.\-]+)*)\}?")
WIDTH, INNER = SIZES["hidden_size"], SIZES["intermediate_size"]
MATRICES = ((WIDTH, 8, 4, 4), (64, WIDTH), (WIDTH, 2, INNER), (INNER, WIDTH))
"""Queries, keys and values by heads; what attention gives; the MLP's two."""


def lowered(layers: int, gather: Any, *, reward: bool, spec: str = "fsdp=8") -> jax.stages.Lowered:
    """Sampling on a mesh, by ARGS of four candidates where there is a reward."""
    mesh = sharding.make_mesh(spec)
    config = dataclasses.replace(CONFIG, num_layers=layers, **SIZES)

    def part(head: models.Head | None) -> tuple[models.LanguageModel, Any]:
        lm = models.LanguageModel(dataclasses.replace(config, head=head), "bfloat16", mesh, gather=gather)
        return lm, dry_run.abstract(jax.eval_shape(lm.init, jax.random.key(0)), mesh)

    (lm, params), (scorer, own) = part(None), part(models.Head("reward"))
    policy: Any = policies.language_model(lm)
    if reward:
        policy, params = policies.tilt(policy, critics.args(scorer), top_k=4), policies.TiltParams(params, own, 1.0)
    rows = {"shape": (ROWS, 8), "sharding": sharding.batch_sharding(mesh)}
    prompts = TokenBatch(jax.ShapeDtypeStruct(dtype=jnp.int32, **rows), jax.ShapeDtypeStruct(dtype=bool, **rows))

    def sample(params: Any, prompts: TokenBatch, rng: Any) -> Any:
        return decoding.sample(policy, params, rng, prompts, max_new_tokens=16, eos_ids=(0,))

    return jax.jit(sample).lower(params, prompts, jax.random.key(0))


def matrices_in_loops(compiled: str) -> int:
    """How many matrices of layers a compiled program puts together inside of loops."""
    callers: dict[str, list[tuple[str, str]]] = {}
    found, current = [], ""
    for line in compiled.splitlines():
        if begins := COMPUTATION.match(line):
            current = begins[1]
        for kind, names in CALLED.findall(line):
            for name in names.split(", "):
                callers.setdefault(name.lstrip("%"), []).append((current, kind))
        if gather := GATHER.search(line):
            shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", gather[1])]
            found += [current for shape in shapes if shape in MATRICES]

    def in_loop(name: str) -> bool:
        return any(kind == "body" or in_loop(caller) for caller, kind in callers.get(name, ()))

    return sum(map(in_loop, found))


def check_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that a quarter of an accelerator's memory holds is put together where the compiler likes."""
    mesh = sharding.make_mesh(BOTH)
    lm = models.LanguageModel(dataclasses.replace(CONFIG, **SIZES), "bfloat16", mesh)
    sizes = [x.size for x in jax.tree.leaves(jax.eval_shape(lm.init, jax.random.key(0))) if x.ndim > 1]
    for memory, found in ((None, True), (4 * sum(sizes), True), (4.1 * sum(sizes), False)):
        monkeypatch.setattr(_devices, "memory", lambda memory=memory: memory)
        assert lm._module.in_turn == found, (memory, sum(sizes))
        assert not dataclasses.replace(lm, mesh=sharding.make_mesh("tensor=8"))._module.in_turn


def main() -> None:
    """By the compiler as it comes, which moves out of a loop what does not change there, and puts together once what
    several passes read; and in the order of an accelerator's, two more layers of base and reward take little."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_auto(monkeypatch)
    layers = 2
    ahead = matrices_in_loops(lowered(layers, "ahead", reward=False).compile().as_text())
    assert ahead == 0, "the compiler moves nothing out of the loop: nothing is tested"
    in_turn = matrices_in_loops(lowered(layers, "in_turn", reward=True).compile().as_text())
    assert in_turn == 2 * len(MATRICES) * layers, in_turn  # the base's and the reward's
    matrices = 2 * sum(map(math.prod, MATRICES))
    plans: list[Any] = [dry_run.planned(lowered(n, "auto", reward=True, spec=BOTH)).memory_analysis() for n in (2, 4)]
    sizes = [plan.temp_size_in_bytes for plan in plans]
    print(f"{sizes} of temporaries; matrices {matrices}")
    assert sizes[1] - sizes[0] < matrices / 4, (sizes, matrices)

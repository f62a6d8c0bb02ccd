"""The run around `training.fit` of the scripts that train a model on rows: its state, batches, devices and figures."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from jaxalign import _hosts, training
from jaxalign.data import batches
from jaxalign.models import sharding
from jaxalign.training import dry_run, flops, job, profiling, states
from jaxalign.training.hooks import Hooks
from jaxalign.training.measure import checked_collate
from jaxalign.training.options import MeshOptions, OptimizerOptions
from jaxalign.training.step import Loss
from jaxalign.types import Params


class Redraw(Protocol):
    """The batch that a step learns from, [b,...] as the one given: redraw(params, step, batch)."""

    def __call__(self, params: Params, step: int, batch: Any, /) -> Any: ...


def _redrawn(step: training.TrainStep, redraw: Redraw) -> training.StepFunction[training.TrainState]:
    """The step on batches that are drawn anew, of one micro-batch."""

    def drawn(state: training.TrainState, batch: Any, frozen: Params) -> tuple[training.TrainState, Any]:
        rows = redraw(state.params, int(_hosts.host_value(state.step)), jax.tree.map(lambda x: x[0], batch))
        return step(state, jax.tree.map(lambda x: x[None], rows), frozen)

    return drawn


def fit_model(
    started: job.StartedModel,
    data: job.Data,
    loss: Loss,
    collate: Callable[[list[Any]], Any],
    *,
    optimizer: OptimizerOptions,
    mesh: MeshOptions,
    seed: int,
    stage: str,
    out: pathlib.Path,
    frozen: Params = None,
    beside: Params = None,
    compared: bool = False,
    redraw: Redraw | None = None,
    hooks: Sequence[Hooks] = (),
) -> Params:
    """Trains all parameters, going on from the newest checkpoint in the run folder.

    Args:
      started: its params are trained, and used up: their memory becomes that of the state, unless `frozen` holds them.
      data: its training rows are used.
      loss: loss(params, batch, frozen) -> (loss, LossAux).
      collate: a list of b rows -> a tree of arrays [b,...].
      optimizer: how long and how fast.
      mesh: micro-batches and devices.
      seed: of the order of rows.
      stage: name of the training in metrics and checkpoints.
      out: the run folder.
      frozen: parameters that the loss takes and that are not trained.
      beside: parameters that the job holds and no step reads: a dry run counts them.
      compared: whether the weights under an adapter are the reference as well, for the count of operations.
      redraw: what turns a batch into the one that is learned from, by the parameters as they stand; None: nothing.
      hooks: what is called beside the steps.

    Returns:
      The trained parameters, float32, on the mesh's devices.
    """
    steps = optimizer.steps_for(len(data.train))
    update, schedule = states.adamw_of(optimizer, steps, started.lm)
    devices = sharding.make_mesh(mesh.mesh)
    step = training.train_step(
        loss, update, schedule=schedule, donate=True, mesh=devices, gradient_dtype=states.gradient_dtype(started.lm)
    )
    if dry_run.is_abstract((started.params, frozen)):
        rows = checked_collate(collate)(dry_run.rows_of_batch(data.train, optimizer.batch_size))
        state = jax.eval_shape(lambda params: training.create(params, update), started.params)
        batch = batches.micro_batches(rows, mesh.accumulate)
        count = flops.counter(started.lm, started.params, frozen, compared=compared)
        size = count(flops.text_lengths(batch))
        found = dry_run.estimate(step, state, batch, frozen, mesh=devices, flops=size, beside=beside)
        dry_run.tell(stage, found, memory=mesh.device_memory)
    place: Callable[[Any], Any] = lambda batch: batch  # noqa: E731
    params = states.owned(started.params, frozen)
    if devices is None:
        state = training.create(params, update)
    else:
        state, frozen = states.on_mesh(devices, params, update), sharding.shard(frozen, devices, others=True)
        by_row = sharding.batch_sharding(devices, ahead=1)
        place = lambda batch: _hosts.put(batch, by_row)  # noqa: E731
    step_function: training.StepFunction[training.TrainState] = step
    if redraw is not None:
        step_function = _redrawn(step, redraw)
    work = (
        None
        if redraw is not None
        else flops.work_of(
            started.lm,
            started.params,
            frozen,
            compared=compared,
            devices=1 if devices is None else devices.size,
            peak_tflops=optimizer.peak_tflops,
        )
    )
    size, accumulate = optimizer.batch_size, mesh.accumulate
    source = batches.batches(data.train, checked_collate(collate), batch_size=size, seed=seed, accumulate=accumulate)
    with profiling.traced(out, optimizer.profile) as traced:
        final = training.fit(
            step_function,
            state,
            source,
            steps=steps,
            out=out,
            stage=stage,
            position={"seed": seed, "batch_size": size, "rows": batches.fingerprint(data.train)},
            frozen=frozen,
            place=place,
            hooks=[*traced, *hooks],
            work=work,
            donate=True,
            save_every=optimizer.save_every,
            log_every=optimizer.log_every,
            track=optimizer.track,
        )
    trained: Params = final.params
    return trained

"""One optimizer step as a pure function: state and batch in, state and metrics out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import Array, Params

Batch = Any  # a pytree of arrays, each [A,b,...]: A micro-batches of b rows
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """step []: optimizer steps taken; params: float32 masters; opt_state: optax's."""

    step: Array
    params: Params
    opt_state: Any


class Measured(NamedTuple):
    """What a loss function returns. loss []: a mean over `weight` [] items (rows, or tokens); metrics: means over the
    same items. Gradients over several micro-batches are then Σ weight·gradient / Σ weight: the large batch's."""

    loss: Array
    weight: Array
    metrics: Mapping[str, Array]


Loss = Callable[[Params, Any, Params], Measured]
"""(params, micro-batch, frozen) -> Measured. `frozen` holds what is not trained, such as a reference model: an argument
and not a closure, since a closure's arrays would be copied into the compiled program."""


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def adamw(
    *,
    learning_rate: float,
    steps: int,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    b2: float = 0.95,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(AdamW with gradients clipped to the global norm `clip`, its schedule).

    The learning rate rises linearly over the first `warmup` share of `steps` and falls to a tenth of its peak on a
    cosine. Weight decay is applied to matrices alone.
    """
    warm = min(max(round(warmup * steps), 1), max(steps - 1, 1))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm + 1), learning_rate / 10)
    # Step 0 would be lost to a learning rate of zero.
    shifted = lambda count: schedule(count + 1)  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            shifted,
            b2=b2,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )
    return optimizer, shifted


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, schedule: optax.Schedule | None = None
) -> Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]:
    """The jitted step(state, batch, frozen) -> (state, metrics); `state` is donated, so use the one that comes back.

    batch: leaves [A,b,...]. The A micro-batches are run one after the other and their gradients added, weighted as
    `Measured` says: the same update as one batch of A·b rows, in the memory of b. metrics: "loss", the loss function's
    own, "grad_norm" before clipping, and "learning_rate" where a schedule is given; each a float32 scalar.
    """

    def scaled(params: Params, part: Any, frozen: Params) -> tuple[Array, tuple[Array, Metrics]]:
        measured = loss(params, part, frozen)
        weight = measured.weight.astype(jnp.float32)
        sums = {"loss": measured.loss, **measured.metrics}
        return measured.loss * weight, (weight, {k: v.astype(jnp.float32) * weight for k, v in sums.items()})

    gradient = jax.grad(scaled, has_aux=True)

    def accumulate(params: Params, batch: Batch, frozen: Params) -> Any:
        parts = jax.tree.leaves(batch)[0].shape[0]
        if parts == 1:
            return gradient(params, jax.tree.map(lambda x: x[0], batch), frozen)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], batch), frozen)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, part, frozen)), None

        return jax.lax.scan(add, zero, batch)[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, frozen: Params = None) -> tuple[TrainState, Metrics]:
        grads, (weight, sums) = accumulate(state.params, batch, frozen)
        # A batch without items has sums of zero: it moves nothing and reports zero.
        total = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / total.astype(g.dtype), grads)
        metrics = {name: value / total for name, value in sums.items()}
        metrics["grad_norm"] = optax.global_norm(grads)
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return step

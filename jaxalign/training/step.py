"""One optimizer step as a pure function: state and batch in, state and metrics out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxalign.models import sharding
from jaxalign.types import Array, Params

Batch = Any  # a pytree of arrays, each [A,b,...]: A micro-batches of b rows
Metrics = dict[str, Array]
RESERVED = ("loss", "grad_norm", "learning_rate")  # metrics of the step itself


class TrainState(NamedTuple):
    """What a training step carries on."""

    step: Array
    """[] int32: optimizer steps taken."""
    params: Params
    """What is trained, as float32 masters."""
    opt_state: Any
    """The optimizer's state, as optax makes it."""


class LossAux(NamedTuple):
    """What a loss gives beside its value."""

    weight: Array
    """[]: the items (rows, or tokens) that the loss is a mean over. Gradients of several micro-batches are added as
    Σ weight·gradient / Σ weight, which is the gradient of the large batch."""
    metrics: Mapping[str, Array]
    """Name -> [], means over the same items."""
    largest: Mapping[str, Array] = {}
    """Name -> [], maxima over them: of several micro-batches the largest is reported."""


class Loss(Protocol):
    """A loss to train by. `jax.value_and_grad(loss, has_aux=True)` works on it."""

    def __call__(self, params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        """The loss of a micro-batch.

        Args:
          params: what is trained.
          batch: a pytree of arrays [b,...].
          frozen: what is not trained, such as a reference model. It is an argument and not part of a closure, since a
            closure's arrays would be copied into the compiled program.

        Returns:
          (loss [], LossAux): a mean over items, and how many they are.
        """


class TrainStep(Protocol):
    """The compiled step that `train_step` makes."""

    def __call__(self, state: TrainState, batch: Batch, frozen: Params = None) -> tuple[TrainState, Metrics]:
        """One step.

        Args:
          state: as `create` or the step before gave it.
          batch: leaves [A,b,...], A micro-batches of b rows.
          frozen: passed to the loss.

        Returns:
          (state, metrics): each metric a float32 scalar.
        """


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Gives the state before the first step.

    Args:
      params: what is trained; the state holds them, not a copy.
      optimizer: any optax transformation.

    Returns:
      The TrainState.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def adamw(
    *,
    learning_rate: float,
    steps: int,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    b2: float = 0.95,
    clip_by_factor: bool = False,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipped gradients and a schedule.

    Args:
      learning_rate: the peak. It is reached linearly over the first `warmup` share of `steps`, and falls to a tenth on
        a cosine.
      steps: optimizer steps of the run.
      warmup: share of the steps, in [0, 1).
      weight_decay: applied to matrices alone.
      clip: largest global norm of a gradient.
      b2: decay of the second moments.
      clip_by_factor: clip by a product with min(1, clip/norm) in place of a quotient by the norm: the same within
        rounding. Compilers make a product again where it is read, while a second copy of all gradients is kept of the
        quotients.

    Returns:
      (optimizer, schedule): the second gives the learning rate of each step.
    """
    warm = min(max(round(warmup * steps), 1), max(steps - 1, 1))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm + 1), learning_rate / 10)
    # Step 0 would be lost to a learning rate of zero.
    shifted = lambda count: schedule(count + 1)  # noqa: E731
    optimizer = optax.chain(
        optax.stateless(functools.partial(_scaled_to, clip)) if clip_by_factor else optax.clip_by_global_norm(clip),
        optax.adamw(
            shifted,
            b2=b2,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )
    return optimizer, shifted


def _scaled_to(clip: float, updates: Params, _: Params) -> Params:
    """Updates of a global norm of at most `clip`."""
    norm = optax.global_norm(updates)
    factor = jnp.where(norm < clip, 1, clip / norm)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates)


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule | None = None,
    donate: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    gradient_dtype: DTypeLike | None = None,
) -> TrainStep:
    """The compiled optimizer step of a loss.

    The A micro-batches of a batch are run one after the other and their gradients added, weighted as `LossAux` says:
    the same update as one batch of A·b rows, in the memory of b.

    Args:
      loss: what is minimised.
      optimizer: optax's.
      schedule: its learning rate, reported as a metric where it is given.
      donate: give the state's memory to the new state. The state that went in, and the parameters that `create` was
        called with, must not be used afterwards.
      mesh: of devices that the state lies on (`models.sharding.shard(state, mesh, others=True)`): gradients, moments
        and parameters of the new state lie as the table of logical axes says.
      gradient_dtype: type in which the gradients of a micro-batch wait for their sum and the update, which are made in
        the type of the parameters. A loss that casts float32 parameters to bfloat16 (`objectives.cast`) has gradients
        of that type: kept in it they take half the memory and lose nothing. None: the type of the parameters.

    Returns:
      step(state, batch, frozen) -> (state, metrics): "loss", the loss's own metrics, "grad_norm" before clipping, and
      "learning_rate".

    Raises:
      ValueError: at the first call, for a loss that does not give (loss [], LossAux), and for a batch whose leaves do
        not share A.
    """

    def scaled(params: Params, part: Any, frozen: Params) -> tuple[Array, tuple[tuple[Array, Metrics], Metrics]]:
        value, aux = checked(loss, loss(params, part, frozen))
        weight = jnp.asarray(aux.weight).astype(jnp.float32)
        sums = {k: jnp.asarray(v).astype(jnp.float32) * weight for k, v in {"loss": value, **aux.metrics}.items()}
        return value * weight, ((weight, sums), {k: jnp.asarray(v).astype(jnp.float32) for k, v in aux.largest.items()})

    def gradient(params: Params, part: Any, frozen: Params) -> tuple[tuple[Params, tuple[Array, Metrics]], Metrics]:
        grads, (sums, largest) = jax.grad(scaled, has_aux=True)(params, part, frozen)
        if gradient_dtype is None:
            return (grads, sums), largest
        # The barrier keeps the compiler from storing what the conversion was made of.
        kept = jax.lax.optimization_barrier(jax.tree.map(lambda g: g.astype(gradient_dtype), grads))
        return (kept, sums), largest

    def accumulate(params: Params, batch: Batch, frozen: Params) -> Any:
        parts = micro_batches(batch)
        if parts == 1:
            return gradient(params, jax.tree.map(lambda x: x[0], batch), frozen)
        (_, sums), largest = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], batch), frozen)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (params, sums))
        zero = sharding.constrain(zero, mesh)
        least = jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf, s.dtype), largest)

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            found, most = gradient(params, part, frozen)
            total = jax.tree.map(lambda whole, new: whole + new.astype(whole.dtype), carry[0], found)
            return (total, jax.tree.map(jnp.maximum, carry[1], most)), None

        return jax.lax.scan(add, (zero, least), batch)[0]

    def step(state: TrainState, batch: Batch, frozen: Params = None) -> tuple[TrainState, Metrics]:
        (grads, (weight, sums)), largest = accumulate(state.params, batch, frozen)
        grads = sharding.constrain(grads, mesh)
        # A batch without items has sums of zero: it moves nothing and reports zero.
        total = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        if gradient_dtype is None:
            grads = jax.tree.map(lambda g: g / total.astype(g.dtype), grads)
        else:
            # By a factor: products of gradients are made again where they are read, which quotients are not.
            share = 1 / total
            grads = jax.tree.map(lambda g, x: g.astype(x.dtype) * share.astype(x.dtype), grads, state.params)
        metrics = {name: value / total for name, value in sums.items()} | largest
        metrics["grad_norm"] = optax.global_norm(grads)
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        after = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        return sharding.constrain(after, mesh), metrics

    return jax.jit(step, donate_argnums=(0,) if donate else ())


def checked(loss: Loss, found: Any) -> tuple[Array, LossAux]:
    """What a loss gave, where it is (loss [], LossAux of scalars). ValueError that names the loss and the part."""
    name = getattr(loss, "__name__", type(loss).__name__)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], LossAux)):
        kinds = [type(part).__name__ for part in found] if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"loss {name}: expected (loss [], LossAux(weight [], metrics)), found {kinds}")
    value, aux = found
    for given in (aux.metrics, aux.largest):
        if not isinstance(given, Mapping):
            raise ValueError(f"loss {name}: expected metrics by name, found {type(given).__name__}")
    if taken := sorted((set(aux.metrics) | set(aux.largest)) & set(RESERVED)):
        raise ValueError(f"loss {name}: expected metrics other than the step's own {RESERVED}, found {taken}")
    if twice := sorted(set(aux.metrics) & set(aux.largest)):
        raise ValueError(f"loss {name}: expected each name once, as a mean or as a largest value, found {twice}")
    for part, x in (("loss", value), ("weight", aux.weight), *aux.metrics.items(), *aux.largest.items()):
        if jnp.shape(x) != ():
            raise ValueError(f"loss {name}: expected {part} of shape (), found {jnp.shape(x)}")
    if not jnp.issubdtype(jnp.asarray(value).dtype, jnp.floating):
        raise ValueError(f"loss {name}: expected a loss in floating point, found {jnp.asarray(value).dtype}")
    return value, aux


def micro_batches(batch: Batch) -> int:
    """A of a batch of leaves [A,b,...]. ValueError: no leaves, or leaves that do not share it."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if not shapes or any(len(shape) < 2 or shape[:2] != shapes[0][:2] for shape in shapes):
        raise ValueError(f"batch: expected arrays [A,b,...] of the same A micro-batches of b rows, found {shapes}")
    return int(shapes[0][0])

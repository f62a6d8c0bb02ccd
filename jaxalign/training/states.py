"""What a run begins with: parameters and training states, made where they lie on a mesh, and the optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxalign import models
from jaxalign._checks import check_rng
from jaxalign.models import sharding
from jaxalign.training.options import OptimizerOptions
from jaxalign.training.step import TrainState, adamw
from jaxalign.training.step import create as create_state
from jaxalign.types import Params


def initial(lm: models.LanguageModel, rng: jax.Array, mesh: jax.sharding.Mesh | None) -> Params:
    """Random parameters, made where they lie: no device holds all of them.

    Args:
      lm: the model.
      rng: a key; consumed.
      mesh: of devices; None for one device.

    Returns:
      The parameters.

    Raises:
      ValueError: an rng that is no key.
    """
    check_rng(rng)
    if mesh is None:
        return lm.init(rng)
    places = sharding.placements(jax.eval_shape(lm.init, rng), mesh)
    return jax.jit(lm.init, out_shardings=places)(rng)


def on_mesh(mesh: jax.sharding.Mesh, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step on a mesh, moments where their parameters are; the parameters are copied.

    Args:
      mesh: of devices.
      params: what is trained.
      optimizer: optax's.
    """

    def create(params: Params) -> TrainState:
        return create_state(jax.tree.map(jnp.copy, params), optimizer)

    placed = sharding.shard(params, mesh, others=True)
    places = sharding.placements(jax.eval_shape(create, placed), mesh, others=True)
    state: TrainState = jax.jit(create, out_shardings=places)(placed)
    return state


def gradient_dtype(lm: models.LanguageModel) -> DTypeLike | None:
    """The type in which the gradients of a step wait for the update: bfloat16 of a model that computes in it, None of
    others (float16 has too narrow a range)."""
    return lm.dtype if lm.dtype == "bfloat16" else None


def adamw_of(
    options: OptimizerOptions, steps: int, lm: models.LanguageModel
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a model and its schedule over that many updates."""
    return adamw(
        learning_rate=options.learning_rate,
        steps=steps,
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        clip=options.clip,
        clip_by_factor=gradient_dtype(lm) is not None,
    )

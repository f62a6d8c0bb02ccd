"""What a run begins with: parameters and training states, made where they lie on a mesh, and the optimizer."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxalign import models
from jaxalign._checks import check_rng
from jaxalign.models import sharding
from jaxalign.models.hf import folders
from jaxalign.training import dry_run
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


def replace_head(
    lm: models.LanguageModel, params: Params, head: models.Head | None, rng: jax.Array
) -> tuple[models.LanguageModel, Params]:
    """Puts a new head on a transformer; lm_head stays or goes as the head's kind says.

    Args:
      lm: the model.
      params: its parameters, or their shapes.
      head: the new head, None for a language model.
      rng: a key for the head's weights; consumed.

    Returns:
      The model and its parameters; those of a new head are float32, and shapes where the others are.

    Raises:
      ValueError: a language model is to be made of a classifier, which has no lm_head; an rng that is no key.
    """
    check_rng(rng)
    new = models.with_head(lm, head)
    if new.has_lm_head and not lm.has_lm_head:
        raise ValueError("model: expected a language model, found a sequence classifier without lm_head")
    wanted, masters = jax.eval_shape(new.init, rng), dataclasses.replace(new, dtype="float32")
    body = {name: params["transformer"][name] for name in wanted["transformer"]}
    made = {} if head is None else {"head": dry_run.apply(lambda body, rng: masters.init_head(rng), body, rng)}
    return new, {"transformer": body} | made


def with_stored_head(params: Params, folder: str, mesh: jax.sharding.Mesh | None) -> Params:
    """The parameters with the head as its folder holds it, in float32: it is trained, where the rest is not.

    Args:
      params: the model's.
      folder: as `models.load` reads it.
      mesh: of devices; None for one device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is odd about the folder has been told
        with folders.stored(folder) as (_, found):
            head = jax.tree.map(lambda x: jnp.asarray(x.part(None)), found["head"])
    whole = {**params, "head": head}
    return whole if mesh is None else sharding.shard(whole, mesh)


def owned(params: Params, frozen: Params) -> Params:
    """Parameters that training steps may take: themselves, and copies of those that are frozen as well."""
    kept = {id(x) for x in jax.tree.leaves(frozen)}
    return jax.tree.map(lambda x: jnp.array(x) if id(x) in kept else jnp.asarray(x), params)


def on_mesh(mesh: jax.sharding.Mesh, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step on a mesh, moments where their parameters are; the parameters are used up.

    Args:
      mesh: of devices.
      params: what is trained.
      optimizer: optax's.
    """

    def create(params: Params) -> TrainState:
        return create_state(params, optimizer)

    placed = sharding.shard(params, mesh, others=True)
    places = sharding.placements(jax.eval_shape(create, placed), mesh, others=True)
    state: TrainState = jax.jit(create, out_shardings=places, donate_argnums=0)(placed)
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

"""Training an adapter in place of all weights, for every script whose loss is a function of a language model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import models
from jaxalign._builders import cached
from jaxalign.training import job, objectives
from jaxalign.training.step import Loss, LossAux
from jaxalign.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions(job.TrainingOptions):
    """Options of a training script that can train an adapter."""

    lora_rank: int = 0
    """Rank of a low-rank adapter, trained on the frozen weights; 0: all weights are trained."""
    lora_alpha: float = 16.0
    """With --lora-rank: the adapter's term is scaled by alpha/rank [1]."""
    lora_targets: tuple[str, ...] = tuple(models.lora.TARGETS)
    """With --lora-rank: the projections that get an adapter."""


def spec_of(config: AdapterOptions) -> models.Lora | None:
    """The adapter that the options ask for, None for all weights. ValueErrors name the option."""
    if config.lora_rank < 0:
        raise ValueError(f"lora_rank: expected at least 0, found {config.lora_rank}")
    if config.lora_rank == 0:
        given = {field.name: field.default for field in dataclasses.fields(AdapterOptions)}
        for name in ("lora_alpha", "lora_targets"):
            if getattr(config, name) != given[name]:
                raise ValueError(f"{name}: expected with --lora-rank, and only there")
        return None
    try:
        return models.Lora(config.lora_rank, config.lora_alpha, config.lora_targets)
    except ValueError as error:
        raise ValueError(f"lora_{error}") from error


def run(
    config: AdapterOptions,
    begin: job.Start,
    data: job.Data,
    loss: Loss,
    collate: Callable[[list[Any]], Any],
    *,
    stage: str,
    out: pathlib.Path,
    frozen: Params = None,
) -> Params:
    """As `job.run`; with --lora-rank it trains the adapter alone, and a reward model's head beside it, writes them to
    adapter/ and gives the merged parameters. The optimizer's state is theirs, the weights are held in the model's dtype
    and not copied.

    frozen: with an adapter it must be None or begin.params: the weights under the adapter are then what the loss gets
    as frozen (the reference of DPO, at no cost).
    """
    spec = spec_of(config)
    if spec is None:
        return job.run(config, begin, data, loss, collate, stage=stage, out=out, frozen=frozen)
    head = begin.lm.config.head
    if head is not None and head.kind != "reward":
        raise ValueError(f"lora_rank: expected 0 for a model with a {head.kind} head, found {config.lora_rank}")
    if frozen is not None and frozen is not begin.params:
        raise ValueError("lora_rank: expected 0 where the frozen model is not the one that is trained")
    masters = models.LanguageModel(begin.lm.config)
    adapter = models.lora.init(jax.random.fold_in(jax.random.key(config.seed), 2), masters, spec)
    weights = objectives.cast(begin.lm, begin.params)
    if head is not None:
        # The head is new, or is to follow the body: it is trained whole beside the adapter, as peft does it.
        begin_both = begin._replace(params={"lora": adapter, "head": begin.params["head"]})
        both = with_adapter_and_head(loss, spec)
        found = job.run(config, begin_both, data, both, collate, stage=stage, out=out, frozen=weights)
        whole = begin.params | {"head": found["head"]}
        return merged(config, masters, whole, found["lora"], out, tokenizer=begin.tokenizer)
    adapted = with_adapter(loss, spec)
    begin_adapter = begin._replace(params=adapter)
    found = job.run(config, begin_adapter, data, adapted, collate, stage=stage, out=out, frozen=weights)
    return merged(config, masters, begin.params, found, out)


def merged(
    config: AdapterOptions,
    lm: models.LanguageModel,
    params: Params,
    adapter: Params,
    out: pathlib.Path,
    *,
    tokenizer: Any = None,
) -> Params:
    """Writes a trained adapter to adapter/, the tokenizer beside it where one is given (a reward model is read by its
    pad id), and gives the float32 weights `params` with the adapter merged in, on the host."""
    spec = spec_of(config)
    assert spec is not None
    head = params["head"] if lm.config.head is not None else None
    models.save_adapter(
        out / "adapter", lm, spec, adapter, base=config.model, head=head, tokenizer=tokenizer, overwrite=True
    )
    return jax.device_get(models.lora.merge(params, adapter, spec))


def reference(config: AdapterOptions, begin: job.Start) -> Params:
    """The model that a run starts from, to be compared with: the weights under an adapter themselves, else a copy in
    the type that it is used in, since a training step gives the state's own arrays away."""
    if config.lora_rank:
        return begin.params
    return jax.tree.map(lambda x: jnp.array(x, begin.lm.dtype), begin.params)


@cached
def with_adapter(loss: Loss, spec: models.Lora) -> Loss:
    """The loss of an adapter: params are its own, frozen the model's weights."""

    def adapted(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        return loss(models.lora.attach(frozen, params, spec), batch, frozen)

    return adapted


@cached
def with_adapter_and_head(loss: Loss, spec: models.Lora) -> Loss:
    """The loss of an adapter and a head: params are {"lora", "head"}, frozen the model's weights."""

    def adapted(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        return loss(models.lora.attach({**frozen, "head": params["head"]}, params["lora"], spec), batch, frozen)

    return adapted

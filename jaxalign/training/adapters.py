"""Training an adapter in place of all weights, for every script whose loss is a function of a language model."""

from __future__ import annotations

import contextlib
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import models
from jaxalign._builders import cached
from jaxalign.models.hf import folders
from jaxalign.training import dry_run, fitting, job
from jaxalign.training.options import AdapterOptions, MeshOptions, OptimizerOptions
from jaxalign.training.step import Loss, LossAux
from jaxalign.types import Array, Params


def spec_of(options: AdapterOptions) -> models.Lora | None:
    """The adapter that the options say.

    Args:
      options: rank, alpha and targets.

    Returns:
      The adapter, None where all weights are trained.

    Raises:
      ValueError: it names the option that is not as expected.
    """
    if options.lora_rank < 0:
        raise ValueError(f"lora_rank: expected at least 0, found {options.lora_rank}")
    if options.lora_rank == 0:
        for name in ("lora_alpha", "lora_targets"):
            if getattr(options, name) != getattr(AdapterOptions(), name):
                raise ValueError(f"{name}: expected with --lora-rank, and only there")
        return None
    try:
        return models.Lora(options.lora_rank, options.lora_alpha, options.lora_targets)
    except ValueError as error:
        raise ValueError(f"lora_{error}") from error


def fit_adapter(
    spec: models.Lora,
    started: job.StartedModel,
    data: job.Data,
    loss: Loss,
    collate: Callable[[list[Any]], Any],
    *,
    base: str,
    optimizer: OptimizerOptions,
    mesh: MeshOptions,
    seed: int,
    stage: str,
    out: pathlib.Path,
    frozen: Params = None,
    redraw: fitting.Redraw | None = None,
) -> Params:
    """Trains an adapter alone, and a reward model's head beside it, and writes them to adapter/. The optimizer's state
    is theirs; the weights are held in the model's type and not copied (nor loaded in another:
    `job.start(trained=False)`).

    Args:
      spec: the adapter.
      started, data, loss, collate, optimizer, mesh, seed, stage, out: as in `fitting.fit_model`.
      base: name of the model under the adapter, for adapter_config.json.
      frozen: None, or the parameters of `started`: the weights under the adapter are then what the loss gets as frozen
        (the reference of DPO, at no cost). Any other parameters are handed to the loss as they are.
      redraw: as in `fitting.fit_model`; it is given the weights with the adapter beside them.

    Returns:
      The parameters with the adapter, as `written` gives them.

    Raises:
      ValueError: a head that cannot be trained beside an adapter.
    """
    head = started.lm.config.head
    if head is not None and head.kind != "reward":
        raise ValueError(f"lora_rank: expected 0 for a model with a {head.kind} head, found {spec.rank}")
    own = frozen is None or frozen is started.params
    weights = held(started.lm, {"transformer": started.params["transformer"]})
    trained = initial(spec, started, seed=seed)

    def drawn(params: Params, step: int, batch: Any) -> Any:
        assert redraw is not None
        return redraw(beside(params, weights, spec), step, batch)

    found = fitting.fit_model(
        started._replace(params=trained),
        data,
        with_adapter(loss, spec, own=own),
        collate,
        optimizer=optimizer,
        mesh=mesh,
        seed=seed,
        stage=stage,
        out=out,
        frozen=weights if own else {"weights": weights, "frozen": frozen},
        compared=own and frozen is not None,
        redraw=None if redraw is None else drawn,
    )
    if head is None:
        return written(spec, started.lm, weights, found, out, base=base)
    whole = weights | {"head": found["head"]}
    return written(spec, started.lm, whole, found["lora"], out, base=base, tokenizer=started.tokenizer)


def initial(spec: models.Lora, started: job.StartedModel, *, seed: int) -> Params:
    """Gives what of a model is trained with an adapter, before the first step.

    Args:
      spec: the adapter.
      started: the model.
      seed: of the adapter's weights.

    Returns:
      A new adapter, float32, that changes nothing; beside a head, which is new or is to follow the body and is trained
      whole, as peft does it: {"lora", "head"}.
    """
    masters = models.LanguageModel(started.lm.config)
    adapter = models.lora.init(jax.random.fold_in(jax.random.key(seed), 2), masters, spec)
    return {"lora": adapter, "head": started.params["head"]} if started.lm.config.head is not None else adapter


def beside(params: Params, weights: Params, spec: models.Lora) -> Params:
    """Puts what `initial` gave, or what became of it, beside a model's weights, of which no copy is made."""
    if "lora" not in params:
        return models.lora.attach(weights, params, spec)
    return models.lora.attach({**weights, "head": params["head"]}, params["lora"], spec)


def at_start(spec: models.Lora | None, started: job.StartedModel, *, seed: int) -> Params:
    """Gives a model's parameters before the first step, of the structure that they have afterwards, so that a program
    of the one serves the other."""
    if spec is None:
        return started.params
    weights = held(started.lm, {"transformer": started.params["transformer"]})
    return beside(initial(spec, started, seed=seed), weights, spec)


def written(
    spec: models.Lora,
    lm: models.LanguageModel,
    params: Params,
    adapter: Params,
    out: pathlib.Path,
    *,
    base: str,
    tokenizer: Any = None,
) -> Params:
    """Writes a trained adapter to adapter/.

    Args:
      spec: the adapter.
      lm: the model; a head is written with the adapter.
      params: its weights, and its float32 head.
      adapter: the trained parameters, float32.
      out: the run folder.
      base: the folder under the adapter, for adapter_config.json; "" where the weights lie in none.
      tokenizer: written beside the adapter where one is given: a reward model is read by its pad id.

    Returns:
      `params` with the adapter beside them (`models.lora.attach`), of which no copy is made; merged where the weights
      lie in no folder.
    """
    masters = models.LanguageModel(lm.config)
    head = params["head"] if lm.config.head is not None else None
    models.save_adapter(
        out / "adapter", masters, spec, adapter, base=base, head=head, tokenizer=tokenizer, overwrite=True
    )
    return (models.lora.attach if base else models.lora.merge)(params, adapter, spec)


@contextlib.contextmanager
def whole(params: Params, *, folder: str, out: pathlib.Path) -> Iterator[Params]:
    """Opens the float32 parameters that a run writes to model/.

    Args:
      params: the run's. An adapter beside them, and weights of another type, which were not trained, stand for the
        arrays of folders: these are read, and the adapter merged in float32, one at a time when they are written.
      folder: which the run started from.
      out: the run folder, with adapter/ where there is an adapter.

    Returns:
      A context of parameters that `models.save` takes.
    """
    body = params["transformer"]
    if "lora" not in params and all(x.dtype == jnp.float32 for x in jax.tree.leaves(body)):
        yield params
        return
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the folder has been told when it was loaded
            _, found = stack.enter_context(folders.stored(out / "adapter" if "lora" in params else folder))
        head = {"head": params["head"]} if "head" in params else {}
        yield {"transformer": {name: found["transformer"][name] for name in body}, **head}


def reference(spec: models.Lora | None, started: job.StartedModel) -> Params:
    """Gives the model that a run starts from, to be compared with.

    Args:
      spec: the adapter that is trained, None for all weights.
      started: the model.

    Returns:
      The weights under an adapter themselves, else a copy in the type that it is used in, since a training step gives
      the state's own arrays away.
    """
    if spec is not None:
        return started.params
    return dry_run.apply(lambda tree: jax.tree.map(lambda x: jnp.array(x, started.lm.dtype), tree), started.params)


def held(lm: models.LanguageModel, params: Params) -> Params:
    """Gives frozen weights in the type that a model computes in, all of them: `objectives.cast` leaves the layers of a
    rematerialised model to the pass that reads them.

    Args:
      lm: the model.
      params: its weights, or their shapes.

    Returns:
      The same tree; arrays of that type themselves.
    """
    one = lambda x: x if x.dtype == lm.dtype else x.astype(lm.dtype)  # noqa: E731
    return dry_run.apply(lambda tree: jax.tree.map(one, tree), params)


@cached
def with_adapter(loss: Loss, spec: models.Lora, *, own: bool = True) -> Loss:
    """Makes the loss of what `initial` gives, of a model's loss.

    Args:
      loss: the model's.
      spec: the adapter.
      own: whether the loss is handed the weights under the adapter as frozen, which are all that is frozen; otherwise
        frozen is {"weights", "frozen"}, and the loss is handed the second.

    Returns:
      The loss.
    """

    def adapted(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        weights, given = (frozen, frozen) if own else (frozen["weights"], frozen["frozen"])
        return loss(beside(params, weights, spec), batch, given)

    return adapted

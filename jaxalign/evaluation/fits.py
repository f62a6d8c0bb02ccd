"""What decoding needs of a device, compiled on shapes alone: no weights are read and nothing is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import _devices, models, rewards
from jaxalign._checks import check_language_model
from jaxalign.evaluation.engine import Method, Texts
from jaxalign.evaluation.loading import Scorer
from jaxalign.evaluation.options import DecodeOptions
from jaxalign.evaluation.settings import Setting
from jaxalign.evaluation.specs import Spec
from jaxalign.models import sharding
from jaxalign.prompts import prompt_batch
from jaxalign.training import dry_run
from jaxalign.types import Array, Params, Reward, TokenBatch

Build = Callable[[Setting, Spec], list[Method]]


class Shapes(NamedTuple):
    """The models of a run without weights."""

    models: dict[str, models.LanguageModel]
    """By role, over one vocabulary."""
    params: dict[str, Params]
    """Shapes of the parameters by role; roles that share a folder share them."""


def load_shapes(folders: dict[str, str], *, dtype: str, mesh: jax.sharding.Mesh | None) -> Shapes:
    """The models of a run from their configs alone, as `loading.load` gives them.

    Args:
      folders: {"model": the base's folder, role: folder, …}.
      dtype: of parameters and activations.
      mesh: of devices that they would lie on.

    Raises:
      ValueError: vocabularies of which none is the beginning of the others, an axis that does not divide over the mesh.
    """
    distinct: dict[str, str] = {}
    for name, folder in folders.items():
        distinct.setdefault(folder, name)
    known = [dry_run.load_shapes(folder, dtype=dtype) for folder in distinct]
    matched: list[models.LanguageModel] = []

    def match(params: list[Params]) -> list[Params]:
        given = [(lm, own) for (lm, _), own in zip(known, params, strict=True)]
        found = models.match_vocabulary(*given, names=tuple(distinct.values()))
        matched.extend(lm for lm, _ in found)
        return [own for _, own in found]

    shapes = jax.eval_shape(match, [params for _, params in known])
    placed = [dry_run.abstract(own, mesh) for own in shapes]
    lms = [models.LanguageModel(lm.config, dtype, mesh) for lm in matched]
    by_folder = dict(zip(distinct, zip(lms, placed, strict=True), strict=True))
    of = {name: by_folder[folder] for name, folder in folders.items()}
    return Shapes({name: lm for name, (lm, _) in of.items()}, {name: own for name, (_, own) in of.items()})


def tell(
    options: DecodeOptions,
    specs: Sequence[Spec],
    build: Callable[[Spec], Build],
    folders: dict[str, str],
    texts: Texts,
    reader: rewards.Reader,
) -> None:
    """Ends a dry run with what each method needs of a device for a batch of the longest prompts.

    Args:
      options: of the run.
      specs: its methods.
      build: spec -> its builder.
      folders: role -> folder of the models that are loaded.
      texts: the prompts.
      reader: the base's tokens.

    Raises:
      dry_run.Told: always, with the figures of the method that needs most.
    """
    if options.reward_threshold is None:  # its default is measured on responses
        options = dataclasses.replace(options, reward_threshold=0.0)
    mesh = sharding.make_mesh(options.mesh, local=True)
    sharding.check_rows_divide(mesh, options.batch_size, name="batch_size")
    shapes = load_shapes(folders, dtype=options.dtype, mesh=mesh)
    check_language_model("model", shapes.models["model"], options.model)
    reader = reader._replace(lm=shapes.models["model"])
    prompts = prompt_batch(dry_run.rows_of_batch(texts.ids, options.batch_size), batch_size=options.batch_size)
    rows = None if mesh is None else sharding.batch_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), prompts)
    devices = 1 if mesh is None else mesh.size
    kind = _devices.every()[0].device_kind
    print(f"decode: an estimate, by the program compiled for {devices} of {kind}; per device, weights included:")
    most: dry_run.Estimate | None = None
    for spec in specs:
        for name, found in _methods(options, spec, build(spec), shapes, texts, reader, batch, devices):
            fits = dry_run.fitting(found, options.device_memory)
            print(
                f"  {name}: {found.total / 1e9:.4g} GB, weights {found.frozen / 1e9:.4g} GB, caches and all else "
                f"{found.temporaries / 1e9:.4g} GB: {fits}",
                flush=True,
            )
            most = found if most is None or found.total > most.total else most
    raise dry_run.Told(most)


def _methods(
    options: DecodeOptions,
    spec: Spec,
    build: Build,
    shapes: Shapes,
    texts: Texts,
    reader: rewards.Reader,
    batch: TokenBatch,
    devices: int,
) -> list[tuple[str, dry_run.Estimate]]:
    """(name, figures) of each program of a spec: strengths that share one are told once."""
    roles = {"model", *spec.folders, *(set(shapes.params) if spec.needs_reward else ())}
    own = {name: params for name, params in shapes.params.items() if name in roles}

    def plan(params: dict[str, Params]) -> list[Method]:
        loaded = {name: (shapes.models[name], params[name]) for name in params}
        scorer = _scorer(options, loaded, reader) if spec.needs_reward else None
        with jax.ensure_compile_time_eval():  # strengths are read as numbers
            return build(Setting(options, loaded, scorer, texts, reader), spec)

    # All models of the run lie on the devices, whichever of them a method reads; roles of one folder share one.
    weights = dry_run.bytes_of(list({id(params): params for params in shapes.params.values()}.values()))
    titles: dict[Any, tuple[int, str]] = {}

    def note(params: dict[str, Params]) -> Array:
        for i, method in enumerate(plan(params)):
            titles.setdefault(method.trace, (i, method.name))
        return jnp.zeros(())

    jax.eval_shape(note, own)
    found = []
    for index, name in titles.values():

        def program(params: dict[str, Params], rng: Array, prompts: TokenBatch, index: int = index) -> Any:
            return plan(params)[index].draw(rng, prompts)

        lowered = jax.jit(program, static_argnums=3).lower(own, jax.random.key(0), batch, index)
        memory: Any = dry_run.planned(lowered).memory_analysis()
        rest = memory.output_size_in_bytes + memory.temp_size_in_bytes
        total, tokens = weights + dry_run.bytes_of(batch) + rest, batch.tokens.shape[0] * options.max_new_tokens
        found.append((name, dry_run.Estimate(devices, 0, 0, weights, rest, total, 0.0, tokens)))
    return found


def _scorer(options: DecodeOptions, loaded: dict[str, Any], reader: rewards.Reader) -> Scorer:
    """--reward on shapes. A model that reads texts through its own tokenizer, and a program, compute nothing here."""

    def open_model(role: str, folder: str, label: str | None, /) -> tuple[Reward, Params]:
        if role not in loaded:
            return _nothing, None
        lm, params = loaded[role]
        return rewards.base_tokens(reader, folder, lm, params, label=label, name=role)

    reward, params = rewards.build_reward(options.reward, open_model=open_model, reader=reader, name="reward")
    return Scorer(reward, params, reward)


def _nothing(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
    return jnp.zeros(prompt_length.shape, jnp.float32)

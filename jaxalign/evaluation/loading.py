"""Models of a run from their folders, over one vocabulary, and the rewards that score it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxalign import models, policies, rewards
from jaxalign._checks import check_prompt_fits
from jaxalign.evaluation.options import ResponseOptions
from jaxalign.evaluation.specs import Spec
from jaxalign.models import sharding
from jaxalign.models.hf import folders as hf_folders
from jaxalign.training import law_sources
from jaxalign.types import Params, Reward, TokenBatch

Model: TypeAlias = tuple[models.LanguageModel, Params]


OTHER = "with_model:"
"""What the roles of --with-model begin with."""


def other_models(given: Sequence[str]) -> dict[str, str]:
    """Role -> folder of --with-model NAME=DIR.

    Raises:
      ValueError: another form, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name.isidentifier() or not folder or OTHER + name in found:
            raise ValueError(f"with_model: expected NAME=DIR, each name once, found {text!r}")
        found[OTHER + name] = folder
    return found


class Scorer(NamedTuple):
    """A Reward with its parameters."""

    reward: Reward
    """The Reward, compiled where it is a model."""
    params: Params
    """The parameters of the reward; None for a program."""
    plain: Reward
    """The Reward as methods take it into their own programs."""


def load(folders: dict[str, str], tokenizer: Any, *, dtype: str, mesh: str, batch_size: int) -> dict[str, Model]:
    """Loads the models of a run over one vocabulary: equal, or appended rows cut with a warning.

    Args:
      folders: {"model": the base's folder, role: folder, …}; roles that share a folder load it once.
      tokenizer: the base's.
      dtype: of parameters and activations.
      mesh: as `sharding.make_mesh` reads it.
      batch_size: rows of a batch.

    Returns:
      Model and parameters by role.

    Raises:
      ValueError: names the role: another tokenizer, an EOS that the common vocabulary lacks, a mesh that does not fit.
    """
    devices = sharding.make_mesh(mesh, local=True)
    sharding.check_rows_divide(devices, batch_size, name="batch_size")
    distinct: dict[str, str] = {}  # folder -> its first role, the base's before all others
    for name, folder in folders.items():
        distinct.setdefault(folder, name)
    for folder, name in distinct.items():
        hf_folders.check_fits(folder, devices, name=name)
    for folder, name in distinct.items():
        if folder != folders["model"]:
            models.check_tokens(tokenizer, models.tokenizer(folder), name=name)
    pairs = [models.load(folder, dtype=dtype, mesh=devices) for folder in distinct]
    matched = models.match_vocabulary(*pairs, names=tuple(distinct.values()))
    if devices is not None:
        matched = [(lm, sharding.shard(params, devices)) for lm, params in matched]
    by_folder = dict(zip(distinct, matched, strict=True))
    models.check_rows(tokenizer, matched[0][0].vocab_size)
    models.check_ends_kept(pairs[0][0], matched[0][0])
    return {name: by_folder[folder] for name, folder in folders.items()}


def over_base_tokens(reader: rewards.Reader, given: dict[str, str]) -> dict[str, str]:
    """Role -> folder of the reward models that read the base's tokens. The others, which read whole responses through a
    tokenizer of their own, are told."""
    found = {}
    for name, spec in given.items():
        for role, folder in rewards.reward_roles(spec, name=name).items():
            if why := rewards.own_reading(reader, folder):
                print(f"{role}: {folder} has {why} than the base: it scores whole responses through its own tokenizer")
            else:
                found[role] = folder
    return found


def scorers(
    given: dict[str, str],
    loaded: dict[str, Model],
    reader: rewards.Reader,
    prompts: TokenBatch,
    max_new_tokens: int,
    *,
    dtype: str,
) -> dict[str, Scorer]:
    """A Scorer for each reward option that is given.

    Args:
      given: option -> value, {"reward": …, "gold": …}; "" for none.
      loaded: the models of their `rewards.reward_roles` over the base's tokens; those that are not there read whole
        texts through their own tokenizer.
      reader: the base's tokens and the prompts as they were given.
      prompts: all prompts of the run, which must fit.
      max_new_tokens: the limit of a response [tokens].
      dtype: of models that are loaded here.

    Raises:
      ValueError: names the option.
    """

    def open_model(role: str, folder: str, label: str | None, /) -> tuple[Reward, Params]:
        if role not in loaded:
            return rewards.own_texts(reader, folder, label=label, dtype=dtype, name=role)
        lm, params = loaded[role]
        check_prompt_fits(lm, prompts, max_new_tokens, name=role)
        return rewards.base_tokens(reader, folder, lm, params, label=label, name=role)

    out: dict[str, Scorer] = {}
    for name, spec in given.items():
        if spec:
            reward, params = rewards.build_reward(spec, open_model=open_model, reader=reader, name=name)
            # Compiled as a whole: on a mesh a program's numbers do not lie as a model's do. A program alone is not.
            out[name] = Scorer(reward if params is None else rewards.compiled(reward), params, reward)
    return out


def check_laws(options: ResponseOptions, specs: Sequence[Spec], tokenizer: Any) -> None:
    """Checks that the heads of laws of a run were learned with its base, reward, template, temperature and limit.

    Args:
      options: model, reward, max_new_tokens, temperature and generation_config are read.
      specs: the methods.
      tokenizer: the base's.

    Raises:
      ValueError: as `law_sources.check`. A head that does not tell is passed over, which is printed.
    """
    folders = {term.folder: term.critic for spec in specs for term in spec.terms}
    told = [folder for folder in folders if (pathlib.Path(folder) / law_sources.FILE).is_file()]
    for folder, critic in folders.items():
        if critic == "distribution" and folder not in told:
            print(f"note: {folder} has no {law_sources.FILE}; of which base and reward its laws are is not known")
    sampling = policies.Sampling(options.temperature)
    if told and options.generation_config:
        sampling = policies.read_generation_config(models.read_config(options.model).generation)
    law_sources.check(
        told,
        base=options.model,
        reward=options.reward,
        tokenizer=tokenizer,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
    )

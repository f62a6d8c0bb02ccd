"""Models of a run from their folders, over one vocabulary, and the rewards that score it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxalign import models, rewards
from jaxalign._checks import check_prompt_fits
from jaxalign.models import sharding
from jaxalign.types import Params, Reward, TokenBatch

Model: TypeAlias = tuple[models.LanguageModel, Params]


class Scorer(NamedTuple):
    """A Reward with its parameters."""

    reward: Reward
    """The Reward, compiled where it is a model."""
    params: Params
    """The parameters of the reward; None for a program."""


def load(folders: dict[str, str], *, dtype: str, mesh: str, batch_size: int) -> tuple[Any, dict[str, Model]]:
    """Loads the models of a run over one vocabulary: equal, or appended rows cut with a warning.

    Args:
      folders: {"model": the base's folder, role: folder, …}; roles that share a folder load it once.
      dtype: of parameters and activations.
      mesh: "data=N" or "".
      batch_size: rows of a batch, which N divides.

    Returns:
      (the base's tokenizer, model and parameters by role).

    Raises:
      ValueError: names the role: another tokenizer, an EOS that the common vocabulary lacks, a mesh that does not fit.
    """
    devices = sharding.make_mesh(mesh)
    if devices is not None and batch_size % devices.size:
        raise ValueError(f"mesh: expected a divisor of batch_size {batch_size}, found {mesh!r}")
    tokenizer = models.tokenizer(folders["model"])
    distinct: dict[str, str] = {}  # folder -> its first role, the base's before all others
    for name, folder in folders.items():
        distinct.setdefault(folder, name)
    for folder, name in distinct.items():
        if folder != folders["model"]:
            models.check_tokens(tokenizer, models.tokenizer(folder), name=name)
    pairs = [models.load(folder, dtype=dtype, mesh=devices) for folder in distinct]
    matched = models.match_vocabulary(*pairs, names=tuple(distinct.values()))
    by_folder = dict(zip(distinct, matched, strict=True))
    models.check_rows(tokenizer, matched[0][0].vocab_size)
    lost = set(pairs[0][0].config.eos_ids) - set(matched[0][0].config.eos_ids)
    if lost:
        raise ValueError(
            f"model: expected EOS ids within the common vocabulary of {matched[0][0].vocab_size} tokens, found "
            f"{sorted(lost)}: responses would not end"
        )
    return tokenizer, {name: by_folder[folder] for name, folder in folders.items()}


def check_language_model(name: str, lm: models.LanguageModel, folder: str) -> None:
    """ValueError that names the role of a model without vocabulary logits."""
    if not lm.has_lm_head:
        raise ValueError(f"{name}: expected a language model, found a sequence classifier in {folder}")


def check_scalar(name: str, lm: models.LanguageModel, folder: str) -> None:
    """ValueError that names the role of a model without a scalar head."""
    if lm.head_width != 1:
        raise ValueError(f"{name}: expected a model with a scalar head, found {lm.config.head} in {folder}")


def scorers(
    given: dict[str, str], loaded: dict[str, Model], tokenizer: Any, prompts: TokenBatch, max_new_tokens: int
) -> dict[str, Scorer]:
    """A Scorer for each reward option that is given.

    Args:
      given: option -> value, {"reward": …, "gold": …}; "" for none.
      loaded: the models of their `rewards.reward_roles`.
      tokenizer: the base's.
      prompts: all prompts of the run, which must fit.
      max_new_tokens: the limit of a response [tokens].

    Raises:
      ValueError: names the option.
    """

    def load_role(role: str, folder: str, /) -> Model:
        lm, params = loaded[role]
        check_scalar(role, lm, folder)
        check_prompt_fits(lm, prompts, max_new_tokens, name=role)
        return lm, params

    out: dict[str, Scorer] = {}
    for name, spec in given.items():
        if spec:
            read = functools.partial(_text, tokenizer)
            reward, params = rewards.build_reward(spec, load=load_role, decode=read, name=name)
            # Compiled as a whole: on a mesh a program's numbers do not lie as a model's do. A program alone is not.
            out[name] = Scorer(reward if params is None else rewards.compiled(reward), params)
    return out


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


@contextlib.contextmanager
def program_errors() -> Iterator[None]:
    """Raises the ValueErrors of programs in rewards as ValueErrors: jax reports what fails in a callback as an error of
    its own, with the traceback as its text."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"^ValueError: (.*: expected .*)", str(error), re.MULTILINE):
            raise ValueError(found.group(1)) from error
        raise

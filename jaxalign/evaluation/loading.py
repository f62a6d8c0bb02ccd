"""Models of a run from their folders, over one vocabulary, and the rewards that judge it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from jaxalign import models, rewards
from jaxalign._checks import check_prompt_fits
from jaxalign.evaluation.engine import Judge
from jaxalign.models import sharding
from jaxalign.types import Params, TokenBatch

Model = tuple[models.LanguageModel, Params]


def load(folders: dict[str, str], *, dtype: str, mesh: str, batch_size: int) -> tuple[Any, dict[str, Model]]:
    """(tokenizer, models by role) of {"model": the base's folder, role: folder}, all over one vocabulary: equal,
    appended rows cut with a warning, or an error."""
    devices = sharding.make_mesh(mesh)
    if devices is not None and batch_size % devices.size:
        raise ValueError(f"mesh: expected a divisor of batch_size {batch_size}, found {mesh!r}")
    tokenizer = models.tokenizer(folders["model"])
    distinct: dict[str, str] = {}  # folder -> its first role: one load where roles share a folder, the model first
    for name, folder in folders.items():
        distinct.setdefault(folder, name)
    for folder, name in distinct.items():
        if folder != folders["model"]:
            models.check_tokens(tokenizer.get_vocab(), models.tokenizer(folder).get_vocab(), name=name)
    pairs = [models.load(folder, dtype=dtype, mesh=devices) for folder in distinct]
    matched = models.match_vocabulary(*pairs, names=tuple(distinct.values()))
    by_folder = dict(zip(distinct, matched, strict=True))
    lost = set(pairs[0][0].config.eos_ids) - set(matched[0][0].config.eos_ids)
    if lost:
        raise ValueError(
            f"model: expected EOS ids within the common vocabulary of {matched[0][0].vocab_size} tokens, found "
            f"{sorted(lost)}: responses would not end"
        )
    return tokenizer, {name: by_folder[folder] for name, folder in folders.items()}


def check_language_model(name: str, lm: models.LanguageModel, folder: str) -> None:
    if not lm.has_lm_head:
        raise ValueError(f"{name}: expected a language model, found a sequence classifier in {folder}")


def check_scalar(name: str, lm: models.LanguageModel, folder: str) -> None:
    if lm.head_width != 1:
        raise ValueError(f"{name}: expected a model with a scalar head, found {lm.config.head} in {folder}")


def judges(
    given: dict[str, str], loaded: dict[str, Model], tokenizer: Any, prompts: TokenBatch, max_new_tokens: int
) -> dict[str, Judge]:
    """A Judge for each of {"reward": as `rewards.parse_reward` reads it, "gold": …} that is named, over the models of
    its `rewards.reward_roles`. ValueErrors name it."""

    def load_role(role: str, folder: str) -> Model:
        lm, params = loaded[role]
        check_scalar(role, lm, folder)
        check_prompt_fits(lm, prompts, max_new_tokens, name=role)
        return lm, params

    out: dict[str, Judge] = {}
    for name, spec in given.items():
        if spec:
            read = functools.partial(_text, tokenizer)
            reward, params = rewards.build_reward(spec, load=load_role, decode=read, name=name)
            # Compiled as a whole: on a mesh a program's numbers do not lie as a model's do. A program alone is not.
            out[name] = Judge(reward if params is None else jax.jit(reward), params)
    return out


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)

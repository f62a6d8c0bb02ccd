"""Two models decode together only over one vocabulary: equal ids, or ids that one of them merely appends."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

from jaxalign.models.language_model import LanguageModel
from jaxalign.types import Params


def cut_vocabulary(lm: LanguageModel, params: Params, size: int) -> tuple[LanguageModel, Params]:
    """Cuts a model to its first token ids: rows of the embedding, columns of lm_head and of a Q head.

    Args:
      lm: the model.
      params: its parameters.
      size: how many ids are kept. EOS, BOS and pad ids beyond them are dropped.

    Returns:
      The smaller model and its parameters.

    Raises:
      ValueError: a size outside [1, V].
    """
    config = lm.config
    if not 1 <= size <= config.vocab_size:
        raise ValueError(f"size: expected 1 to {config.vocab_size}, found {size}")

    def kept(i: int | None) -> int | None:
        return i if i is not None and i < size else None

    eos = tuple(i for i in config.eos_ids if i < size)
    changed = dataclasses.replace(
        config, vocab_size=size, eos_ids=eos, bos_id=kept(config.bos_id), pad_id=kept(config.pad_id)
    )
    body = dict(params["transformer"])
    body["embedding"] = body["embedding"][:size]
    if "lm_head" in body:
        body["lm_head"] = body["lm_head"][:, :size]
    out = {**params, "transformer": body}
    if config.head is not None and config.head.kind == "q":
        outer = params["head"]["outer"]
        out["head"] = {**params["head"], "outer": {"kernel": outer["kernel"][:, :size], "bias": outer["bias"][:size]}}
    return dataclasses.replace(lm, config=changed), out


def check_tokens(base: Mapping[str, int], other: Mapping[str, int], *, name: str = "critic") -> None:
    """Checks that two vocabularies agree on every id that both have; appended ids are allowed.

    Args:
      base: token -> id of the base's tokenizer.
      other: token -> id of the other model's.
      name: the other model's, for the message.

    Raises:
      ValueError: an id that stands for two tokens; the first one is named.
    """
    base_ids = {i: token for token, i in base.items()}
    other_ids = {i: token for token, i in other.items()}
    for i in sorted(base_ids.keys() & other_ids.keys()):
        if base_ids[i] != other_ids[i]:
            raise ValueError(
                f"{name}: expected the base's vocabulary, found id {i} to be {other_ids[i]!r} where the base has "
                f"{base_ids[i]!r}; a model with another tokenizer can only score text (rewards.from_text)"
            )


def match_vocabulary(
    *models: tuple[LanguageModel, Params], names: tuple[str, ...] = ()
) -> list[tuple[LanguageModel, Params]]:
    """Brings all models over the smallest of their vocabularies.

    A model with appended rows is cut, with a warning that names it; whether shared ids mean the same token is for
    `check_tokens`.

    Args:
      models: (model, parameters) of each.
      names: theirs, for the warning.

    Returns:
      (model, parameters) of each, in the order given.

    Raises:
      ValueError: no models.
    """
    if not models:
        raise ValueError("models: expected at least one, found none")
    size = min(lm.vocab_size for lm, _ in models)
    out = []
    for i, (lm, params) in enumerate(models):
        if lm.vocab_size != size:
            label = names[i] if i < len(names) else f"model {i}"
            warnings.warn(f"{label}: {lm.vocab_size} rows cut to the common vocabulary of {size} tokens", stacklevel=2)
            lm, params = cut_vocabulary(lm, params, size)
        out.append((lm, params))
    return out

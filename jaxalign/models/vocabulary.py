"""Two models work together only over one vocabulary. One rule says when two vocabularies are one, for every command:

- Ids that a text can hold must stand for the same token in both: all ordinary tokens, and the special ones that a
  tokenizer uses, which are its BOS, EOS and unknown token, what it writes around a text, and what its chat template
  names.
- Two special tokens of which one is not used are not compared: no text of that vocabulary holds the id. Reserved tokens
  that a later version renames are of this kind (<|reserved_special_token_3|> of Llama-3, <|eom_id|> of 3.1).
- A model may have ids that the base lacks. The base may have ids that the other lacks where no text holds them: a
  padding token that was appended ([PAD], V+1), rows that fill a matrix up.
- What is ignored is told in one line, and so is what is cut: rows beyond the common ids.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxalign.models.checks import named
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


class _Vocabulary(NamedTuple):
    """The ids of a tokenizer."""

    token: dict[int, str]
    """Id -> its token."""
    special: frozenset[int]
    """Ids of special tokens."""
    unused: frozenset[int]
    """Ids of special tokens that the tokenizer does not use: no text holds them."""


def _vocabulary(tokenizer: Any) -> _Vocabulary:
    """What a tokenizer's ids stand for; a mapping of tokens to ids holds ordinary tokens alone."""
    if isinstance(tokenizer, Mapping):
        return _Vocabulary({i: token for token, i in tokenizer.items()}, frozenset(), frozenset())
    token = {int(i): str(text) for text, i in tokenizer.get_vocab().items()}
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {int(i) for i, one in added.items() if getattr(one, "special", False)}
    used = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk")}
    used |= set(tokenizer("a", add_special_tokens=True)["input_ids"]) if special else set()
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return _Vocabulary(
        token, frozenset(special), frozenset(i for i in special - used if token.get(i, "") not in template)
    )


def _tell_ignored(name: str, what: str, tokens: Iterable[str]) -> None:
    found = list(tokens)
    if found:
        warnings.warn(f"{name}: {len(found)} {what}: {named(found)}", stacklevel=3)


def check_tokens(base: Any, other: Any, *, name: str = "critic") -> None:
    """Checks that a model reads the base's ids as the base does, by the rule of this module.

    Args:
      base: the base's tokenizer, or token -> id, all of them ordinary.
      other: the other model's, likewise.
      name: the other model's, for messages.

    Raises:
      ValueError: an id that a text can hold and that stands for two tokens, or that the other lacks; the first one is
        named.
    """
    ours, theirs = _vocabulary(base), _vocabulary(other)
    unused, renamed, lacking = (ours.special & theirs.special) & (ours.unused | theirs.unused), [], []
    for i in sorted(ours.token):
        if i not in theirs.token:
            if i not in ours.unused:
                raise ValueError(
                    f"{name}: expected the base's vocabulary, found no id {i}, which is {ours.token[i]!r} of the base; "
                    "a model with another tokenizer can only score text (rewards.from_text)"
                )
            lacking.append(ours.token[i])
        elif ours.token[i] != theirs.token[i]:
            if i not in unused:
                raise ValueError(
                    f"{name}: expected the base's vocabulary, found id {i} to be {theirs.token[i]!r} where the base "
                    f"has {ours.token[i]!r}; a model with another tokenizer can only score text (rewards.from_text)"
                )
            renamed.append(f"{ours.token[i]} = {theirs.token[i]}")
    _tell_ignored(name, "special tokens that one of the two does not use have other names", renamed)
    _tell_ignored(name, "special tokens of the base that no text holds are lacking", lacking)


def check_rows(tokenizer: Any, vocab_size: int, *, name: str = "tokenizer") -> None:
    """Checks that a model has a row for every id that its tokenizer's texts can hold.

    An appended padding token may lie beyond the model's rows: padding is masked, and no text holds it.

    Args:
      tokenizer: of the model.
      vocab_size: the model's number of ids.
      name: the field that messages name.

    Raises:
      ValueError: the tokenizer may write ids that the model lacks.
    """
    found = _vocabulary(tokenizer)
    beyond = {i: token for i, token in sorted(found.token.items()) if i >= vocab_size}
    if any(i not in found.unused for i in beyond):
        raise ValueError(
            f"{name}: expected ids below the model's {vocab_size} tokens, found ids up to {max(beyond)}; is it another "
            "model's?"
        )
    _tell_ignored(name, "special tokens lie beyond the model's rows, and no text holds them", beyond.values())


def match_vocabulary(
    *models: tuple[LanguageModel, Params],
    names: Sequence[str] = (),
    keep_first: bool = False,
    size: int | None = None,
) -> list[tuple[LanguageModel, Params]]:
    """Brings all models over one number of ids: the smallest of their vocabularies, or that of the first.

    Rows beyond it are cut, with a warning that names the model; whether shared ids mean the same token is for
    `check_tokens`.

    Args:
      models: (model, parameters) of each.
      names: theirs, for the warning.
      keep_first: whether the first model keeps its rows, as one that is trained does. Another model that has fewer gets
        rows of zeros for the ids that it lacks, which no text holds; one that scores ids itself cannot.
      size: the largest number of ids, where something else than a model sets it; None: no limit.

    Returns:
      (model, parameters) of each, in the order given.

    Raises:
      ValueError: no models; with keep_first, a model with logits or a Q head that has fewer ids than the first.
    """
    if not models:
        raise ValueError("models: expected at least one, found none")
    smallest = models[0][0].vocab_size if keep_first else min(lm.vocab_size for lm, _ in models)
    size = smallest if size is None else min(size, smallest)
    out = []
    for i, (lm, params) in enumerate(models):
        label = names[i] if i < len(names) else f"model {i}"
        if lm.vocab_size > size:
            common = "the base's vocabulary" if keep_first else "the common vocabulary"
            warnings.warn(f"{label}: {lm.vocab_size} rows cut to {common} of {size} tokens", stacklevel=2)
            lm, params = cut_vocabulary(lm, params, size)
        elif lm.vocab_size < size:
            small, (lm, params) = lm.vocab_size, _filled_up(label, lm, params, size)
            warnings.warn(
                f"{label}: {small} rows filled up to the base's {size} with zeros, for ids that no text holds",
                stacklevel=2,
            )
        out.append((lm, params))
    return out


def check_ends_kept(before: LanguageModel, after: LanguageModel, *, name: str = "model") -> None:
    """Checks that a model whose responses are drawn has kept the ids that end them.

    Args:
      before: the model.
      after: the model over fewer ids.
      name: the field that the message names.

    Raises:
      ValueError: an EOS id was cut.
    """
    lost = set(before.eos_ids) - set(after.eos_ids)
    if lost:
        raise ValueError(
            f"{name}: expected EOS ids within the common vocabulary of {after.vocab_size} tokens, found "
            f"{sorted(lost)}: responses would not end"
        )


def _filled_up(name: str, lm: LanguageModel, params: Params, size: int) -> tuple[LanguageModel, Params]:
    """A model with rows of zeros in its embedding, up to `size` ids. ValueError for one that scores ids."""
    config = lm.config
    if lm.has_lm_head or (config.head is not None and config.head.kind == "q"):
        raise ValueError(f"{name}: expected scores of {size} tokens as the base has, found {lm.vocab_size}")
    body = dict(params["transformer"])
    body["embedding"] = jnp.pad(body["embedding"], ((0, size - lm.vocab_size), (0, 0)))
    return dataclasses.replace(lm, config=dataclasses.replace(config, vocab_size=size)), {**params, "transformer": body}


def with_eos(lm: LanguageModel, eos_ids: Sequence[int]) -> LanguageModel:
    """Gives a model other ids that end a response.

    Args:
      lm: the model.
      eos_ids: all of its EOS ids.

    Returns:
      The model with these ids; its parameters are the same.
    """
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, eos_ids=tuple(eos_ids)))

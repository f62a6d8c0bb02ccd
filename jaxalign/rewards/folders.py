"""Reward models from folders: over the base's vocabulary, token by token, or through a tokenizer of their own."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxalign import models, tokens
from jaxalign.rewards.models import from_model
from jaxalign.rewards.programs import from_text
from jaxalign.rewards.text_models import text_model
from jaxalign.tokens import Messages, Text, TextFormat
from jaxalign.types import Params, Reward

_PROBE = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})


class Reader(NamedTuple):
    """What a reward's texts come from: the base's tokens, and the prompts as they were given."""

    form: TextFormat
    """The base's tokenizer and template."""
    lm: models.LanguageModel | None = None
    """The base's model; None where it is not loaded yet."""
    sources: Sequence[Text] | None = None
    """The prompts that a prompt's index counts, as they were given; None where only their tokens are known."""
    turns: Callable[[str], Messages] | None = None
    """Makes a chat of a prompt in plain text, for reward models with a template; None: one user's turn."""

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids without special tokens.

        Args:
          ids: the base's token ids.

        Returns:
          The text.
        """
        return tokens.decode_text(self.form.tokenizer, ids)

    def rendered(self, ids: Sequence[int]) -> str:
        """Gives the text of ids with special tokens.

        Args:
          ids: the base's token ids.

        Returns:
          The text.
        """
        return tokens.decode_text(self.form.tokenizer, ids, special=True)


def reader_of(
    form: TextFormat,
    lm: models.LanguageModel | None,
    sources: Sequence[Text] | None,
    *,
    turns: Callable[[str], Messages] | None = None,
) -> Reader:
    """A Reader of prompts as they were given; the format's system turn is put into chats that have none.

    Args:
      form, lm, sources, turns: the fields of `Reader`.

    Returns:
      The Reader.
    """
    if sources is not None:
        sources = [x if isinstance(x, str) else tokens.with_system(form, x) for x in sources]
    return Reader(form, lm, sources, turns)


def split_label(source: str) -> tuple[str, str | None]:
    """Splits "FOLDER#LABEL".

    Args:
      source: a folder, and a label of its model behind "#" where one is meant.

    Returns:
      (folder, label); the label is None where there is none.
    """
    folder, sign, label = source.rpartition("#")
    if not sign or pathlib.Path(source).exists():
        return source, None
    return folder, label


def own_reading(reader: Reader, folder: str) -> str:
    """Tells why the reward model of a folder reads texts through a tokenizer of its own.

    It does so where its tokenizer gives other tokens than the base's, and where prompts are chats and its chat template
    writes a conversation in another way. A reward model without a template reads chats as the base's writes them.

    Args:
      reader: the tokenizer and template of the base.
      folder: the reward model's.

    Returns:
      The reason; "" where it reads the base's tokens.

    Raises:
      ValueError: a folder that cannot be read.
    """
    own = models.tokenizer(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is ignored is told where the model is loaded
            models.check_tokens(reader.form.tokenizer, own, name="reward")
    except ValueError:
        return "another vocabulary"
    if not _has_chats(reader) or getattr(own, "chat_template", None) is None:
        return ""
    ours = tokens.text_format(reader.form.tokenizer)
    try:
        same = tokens.conversation_text(tokens.text_format(own), _PROBE) == tokens.conversation_text(ours, _PROBE)
    except ValueError:
        same = False
    return "" if same else "another chat template"


def open_reward(
    reader: Reader, folder: str, *, label: str | None = None, dtype: str = "float32", name: str = "reward"
) -> tuple[Reward, Params]:
    """Loads the reward model of a folder, over the base's tokens or, where it has another tokenizer or template, as a
    reward of whole texts.

    Args:
      reader: the base's tokens and the prompts.
      folder: of a …ForSequenceClassification model, or of an adapter on one.
      label: which of several labels is the reward.
      dtype: of parameters and activations.
      name: what errors call it.

    Returns:
      (reward, params). A reward of whole texts is one that decoders which score tokens refuse by name.

    Raises:
      ValueError: no scalar head, or several labels and none named; another tokenizer where the prompts' texts are not
        known.
    """
    if why := own_reading(reader, folder):
        print(f"{name}: {folder} has {why} than the base: it scores whole responses through its own tokenizer")
        return own_texts(reader, folder, label=label, dtype=dtype, name=name)
    if reader.lm is None:
        raise ValueError(f"{name}: expected the base's model, whose tokens {folder} reads, found none")
    lm, params = models.load_beside(folder, reader.lm, reader.form.tokenizer, name=name, dtype=dtype)
    return base_tokens(reader, folder, lm, params, label=label, name=name)


def base_tokens(
    reader: Reader, folder: str, lm: Any, params: Params, *, label: str | None = None, name: str = "reward"
) -> tuple[Reward, Params]:
    """Makes the reward of a loaded reward model that reads the base's tokens.

    It reads responses with the tail of the base's template where the prompts are chats.

    Args:
      reader: the tokenizer and template of the base.
      folder: where the model comes from, for error texts.
      lm: the loaded model.
      params: its parameters.
      label: which label is the score, where there are several.
      name: the field that errors name.

    Returns:
      (reward, its params).

    Raises:
      ValueError: as of `open_reward`, and another number of tokens than the base's.
    """
    if lm.head_width < 1 or (lm.head_width > 1 and label is None and lm.has_lm_head):
        raise ValueError(f"{name}: expected a model with a scalar head, found {lm.config.head} in {folder}")
    if reader.lm is not None and lm.vocab_size != reader.lm.vocab_size:
        raise ValueError(f"{name}: expected {reader.lm.vocab_size} tokens as the base has, found {lm.vocab_size}")
    tail, ends = template_tail(reader, lm, name=name)
    return from_model(lm, label=label, tail=tail, ends=ends), params


def template_tail(
    reader: Reader, lm: models.LanguageModel, *, name: str = "reward"
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Gives what a reward model over the base's tokens reads after a response: what the base's template writes there.

    Args:
      reader: the tokenizer and template of the base.
      lm: the reward model.
      name: the field that errors name.

    Returns:
      (tail, ends): what follows a turn that has ended, and the ids that end one; ((), None) for plain texts.

    Raises:
      ValueError: chats and texts are mixed, and there is a tail.
    """
    if not _has_chats(reader):
        return (), None
    closing, tail = tokens.turn_end(reader.form)
    if tail and not all(isinstance(source, list | tuple) for source in reader.sources or ()):
        raise ValueError(
            f"{name}: expected prompts that are all chats or all texts, found both: the chat template writes {tail} "
            "after a turn, and nothing follows a text"
        )
    return tuple(tail), tuple(dict.fromkeys((*lm.eos_ids, *closing[-1:])))


def own_texts(
    reader: Reader, folder: str, *, label: str | None = None, dtype: str = "float32", name: str = "reward"
) -> tuple[Reward, Params]:
    """Makes the reward of a reward model that reads whole texts through its own tokenizer and template.

    Args:
      reader: the tokenizer and template of the base.
      folder: the reward model's.
      label: which label is the score, where there are several.
      dtype: of the loaded weights.
      name: the field that errors name.

    Returns:
      (reward, None).

    Raises:
      ValueError: as of `open_reward`.
    """
    if reader.sources is None:
        raise ValueError(f"{name}: expected the base's tokenizer, found another in {folder}, which reads whole texts")
    own = models.tokenizer(folder)
    lm, params = models.load(folder, dtype=dtype, mesh=None if reader.lm is None else reader.lm.mesh)
    if lm.head_width < 1:
        raise ValueError(f"{name}: expected a model with a scalar head, found {lm.config.head} in {folder}")
    form = tokens.text_format(own, eos_ids=lm.eos_ids)
    read = text_model(from_model(lm, label=label), params, form, max_length=lm.max_length, turns=reader.turns)
    return from_text(reader.decode, read, sources=tuple(reader.sources)), None


def _has_chats(reader: Reader) -> bool:
    return any(not isinstance(source, str) for source in reader.sources or ())

"""What turns texts and chats into tokens: a tokenizer, the ids that begin and end a text, the template's arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A chat: [{"role": …, "content": …}, …], as a tokenizer's chat template reads it."""

Text: TypeAlias = str | Messages
"""A plain text or a chat."""


class Tokenizer(Protocol):
    """The methods of a tokenizer that the library calls; those of transformers offer it.

    A chat needs its `chat_template` and `apply_chat_template` too, an appended end its `eos_token_id`.
    """

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """{"input_ids": ids} of a text."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of ids."""

    def get_vocab(self) -> Mapping[str, int]:
        """Token -> id, of all that the tokenizer may give."""


class TextFormat(NamedTuple):
    """How texts and chats become tokens. `text_format` makes one."""

    tokenizer: Any
    """The tokenizer, a `Tokenizer`; chats need those of transformers."""
    prefix: tuple[int, ...]
    """Ids that stand once in front of every text: BOS where the tokenizer writes one."""
    eos_ids: tuple[int, ...]
    """Ids at which generation ends."""
    closing: tuple[int, ...]
    """Ids that end a response in plain text; () appends nothing."""
    specials: frozenset[int]
    """Ids of the tokenizer's special tokens."""
    template_options: Mapping[str, Any]
    """Further arguments of the chat template, for instance {"enable_thinking": False}."""
    system: str | None
    """The system turn of chats that have none of their own; None writes none."""


def text_format(
    tokenizer: Any,
    *,
    eos_ids: Iterable[int] = (),
    closing: Iterable[int] | None = None,
    system: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> TextFormat:
    """Makes a TextFormat of a tokenizer.

    Args:
      tokenizer: a `Tokenizer`.
      eos_ids: ids at which the model's generation ends; the tokenizer's own EOS where there are none.
      closing: ids that end a response in plain text; None takes the tokenizer's EOS, or the first of eos_ids, or
        nothing where neither is known.
      system: a system turn for chats that have none.
      template_options: further arguments of the chat template.

    Returns:
      The TextFormat.
    """
    own = getattr(tokenizer, "eos_token_id", None)
    ends = tuple(int(i) for i in eos_ids) or (() if own is None else (int(own),))
    if closing is None:
        closing = ends[:1] if own is None else (int(own),)
    return TextFormat(
        tokenizer,
        prefix_ids(tokenizer),
        ends,
        tuple(int(i) for i in closing),
        special_ids(tokenizer),
        dict(template_options or {}),
        system,
    )


def raw_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, with nothing that the tokenizer would add to it."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def prefix_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer writes in front of a text, found by asking it: flags in its files are not reliable."""
    probe = "a"
    alone = raw_ids(tokenizer, probe)
    whole = [int(i) for i in tokenizer(probe, add_special_tokens=True)["input_ids"]]
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return tuple(whole[:start])
    return ()


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokenizer's special tokens, those that were added included."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    named = getattr(tokenizer, "all_special_ids", None) or ()
    return frozenset(int(i) for i in named) | {int(i) for i, token in added.items() if getattr(token, "special", False)}

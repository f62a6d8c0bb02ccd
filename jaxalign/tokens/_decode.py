"""From token ids to text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def decode_text(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    """Gives the text of ids; spaces stay as the tokens have them.

    Args:
      tokenizer: the tokenizer.
      ids: token ids.
      special: whether special tokens are written out.

    Returns:
      The text.
    """
    # Cleaning spaces changes text that stands already ("do n" and "'t" to "don't"), which a stream cannot take back.
    options = {"clean_up_tokenization_spaces": False} if hasattr(tokenizer, "clean_up_tokenization_spaces") else {}
    return str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special, **options))


def byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Gives the ids of the tokens that stand for one byte each, as <0xE2>: a vocabulary's way out for unknown
    characters.

    Args:
      tokenizer: the tokenizer.

    Returns:
      The ids; none where the vocabulary has no such tokens.
    """
    return frozenset(i for token, i in tokenizer.get_vocab().items() if re.fullmatch("<0x[0-9A-F]{2}>", token))


def settled_text(tokenizer: Any, ids: Sequence[int], byte_ids: frozenset[int]) -> str:
    """The beginning of the text of ids that no further token changes.

    Left out are a run of byte tokens at the end, whose characters are decided where it ends, and the replacement
    characters of a character that is not whole.

    Args:
      tokenizer: the tokenizer.
      ids: of a response so far.
      byte_ids: `byte_tokens` of the tokenizer.

    Returns:
      That beginning.
    """
    end = len(ids)
    while end and ids[end - 1] in byte_ids:
        end -= 1
    return decode_text(tokenizer, ids[:end]).rstrip("\ufffd")

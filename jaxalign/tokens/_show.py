"""Rows as a reader checks them before a job: every token with its id, and what is given, learned and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Kind of token -> (the letter in plain text, the colour on a terminal).
_KINDS = {
    "given": ("", "\033[90m"),
    "learned": ("+", "\033[32m"),
    "end": ("+", "\033[1;35m"),
    "read": ("~", "\033[33m"),
}
LEGEND = "+ is learned, ~ is read by a reward model alone, the rest is given"


def show_row(tokenizer: Any, parts: Sequence[tuple[str, Sequence[int]]], *, colour: bool = False) -> str:
    """A row as text: tokens in their order, each with its id.

    Args:
      tokenizer: gives the text of an id.
      parts: (kind, ids): "given" to the model, "learned", the learned "end" of a response, "read" by a reward model.
      colour: whether kinds are coloured for a terminal; "+" stands before what is learned and "~" before what is read
        alone, with and without it.

    Returns:
      One line per part, without a newline at the end.

    Raises:
      ValueError: another kind.
    """
    lines = []
    for kind, ids in parts:
        if kind not in _KINDS:
            raise ValueError(f"parts: expected kinds among {sorted(_KINDS)}, found {kind!r}")
        sign, code = _KINDS[kind]
        words = [f"{sign}{token_text(tokenizer, i)!r}:{i}" for i in ids]
        if words:
            line = " ".join(words)
            lines.append(f"{code}{line}\033[0m" if colour else line)
    return "\n".join(lines)


def token_text(tokenizer: Any, token: int) -> str:
    """What one id stands for, as the vocabulary writes it."""
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    if convert is None:
        return str(tokenizer.decode([token], skip_special_tokens=False))
    return str(convert(token))

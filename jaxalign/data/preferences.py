"""Preference pairs and texts as token ids and as padded arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.data import readers
from jaxalign.data import tokens as tokenization
from jaxalign.data.encoded import Loaded as Loaded
from jaxalign.data.encoded import PairTokens as PairTokens
from jaxalign.data.encoded import TextTokens as TextTokens
from jaxalign.data.rows import Example, Pair, Row, Rows
from jaxalign.tokens import Text


class _BadRow(Exception):
    """A row that cannot be used, and why."""


def tokenize_pairs(
    source: str | os.PathLike[str],
    tokenizer: Any,
    *,
    eos_id: int | None,
    max_length: int,
    skip_bad: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Loaded:
    """Reads the preference pairs of a file as token ids.

    Prompt and response are tokenized apart, so that the boundary between them is exact.

    Args:
      source, columns: as in `readers.read_pairs`.
      tokenizer: turns text into ids; with a chat template where rows hold messages.
      eos_id: ends each response; None: nothing is appended.
      max_length: of prompt and response together [tokens]. A prompt that is too long loses its beginning; a response
        that leaves no room for one prompt token makes a bad row.
      skip_bad: leaves bad rows out and counts them.

    Returns:
      Loaded, whose rows are `PairTokens`.

    Raises:
      ValueError: a bad row (its file, line and reason), a file of another kind, or one without a good row.
    """

    def convert(row: Pair) -> PairTokens:
        (start, chosen), (_, rejected) = (_written(row.prompt, side, tokenizer) for side in (row.chosen, row.rejected))
        templated = not isinstance(row.prompt, str)
        prompt = _prompt_ids(tokenizer, start, templated)
        both = [_response_ids(tokenizer, side, eos_id, templated) for side in (chosen, rejected)]
        if both[0] == both[1]:
            raise _BadRow("expected two responses that differ, found the same tokens twice")
        return PairTokens(_cut(prompt, max(map(len, both)), max_length), both[0], both[1], row.where, start)

    return _load(readers.read_pairs(source, columns=columns, skip_bad=skip_bad), convert, skip_bad)


def tokenize_texts(
    source: str | os.PathLike[str],
    tokenizer: Any,
    *,
    eos_id: int | None,
    max_length: int,
    skip_bad: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Loaded:
    """Reads the texts of a file as token ids; of a preference pair the chosen response.

    Args:
      source, tokenizer, eos_id, max_length, skip_bad, columns: as in `tokenize_pairs`; a text without a prompt that is
        too long loses its end.

    Returns:
      Loaded, whose rows are `TextTokens`.

    Raises:
      ValueError: as in `tokenize_pairs`.
    """

    def convert(row: Example) -> TextTokens:
        whole = isinstance(row.response, list) and not row.prompt
        given, said = (row.response[:-1], row.response[-1:]) if whole else (row.prompt, row.response)
        start, answer = _written(given, said, tokenizer)
        templated = not isinstance(given, str)
        prompt = _prompt_ids(tokenizer, start, templated, empty=not start)
        response = _response_ids(tokenizer, answer, eos_id, templated)
        if not start:
            return TextTokens(prompt, response[: max_length - len(prompt)], row.where, answer)
        return TextTokens(_cut(prompt, len(response), max_length), response, row.where, start)

    return _load(readers.read_examples(source, columns=columns, skip_bad=skip_bad), convert, skip_bad)


def read_strings(
    source: str | os.PathLike[str], *, skip_bad: bool = False, columns: Mapping[str, str] | None = None
) -> Loaded:
    """Reads every text, for a tokenizer's training: prompts with their responses.

    Args:
      source, skip_bad, columns: as in `tokenize_pairs`; rows of chat messages are bad.

    Returns:
      Loaded, whose rows are strings.

    Raises:
      ValueError: as in `tokenize_pairs`.
    """

    def convert(row: readers.Strings) -> list[str]:
        texts = [text for text in row.texts if isinstance(text, str)]
        if len(texts) < len(row.texts):
            raise _BadRow("expected text, found lists of messages")
        return texts

    found = _load(readers.read_strings(source, columns=columns, skip_bad=skip_bad), convert, skip_bad)
    return found._replace(rows=[text for texts in found.rows for text in texts])


def split_by_prompt(rows: Sequence[Any], *, fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Splits rows into a training and a validation part by a hash of seed and prompt.

    No prompt is in both parts, and the part of a prompt does not depend on the other rows.

    Args:
      rows: anything with `prompt`. Rows of files are split by the uncut text of their prompt, or by that of the
        response where there is none (`split_key`).
      fraction: the probability of the validation part.
      seed: of the hash.

    Returns:
      (training rows, validation rows), each in the order given.

    Raises:
      ValueError: a fraction outside (0, 1), or a part that comes out empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a share in (0, 1), found {fraction}")
    parts: tuple[list[Any], list[Any]] = ([], [])
    for row in rows:
        key = getattr(row, "split_key", "") or row.prompt
        digest = hashlib.blake2b(json.dumps([seed, key]).encode(), digest_size=8).digest()
        parts[int.from_bytes(digest, "big") < fraction * 2**64].append(row)
    for name, part in zip(("training", "validation"), parts, strict=True):
        if not part:
            raise ValueError(f"fraction: expected a {name} part with rows, found none of {len(rows)} at {fraction}")
    return parts


def pad_texts(rows: Sequence[TextTokens], *, length: int) -> dict[str, np.ndarray]:
    """Texts as right-padded arrays.

    Args:
      rows: the texts, B of them.
      length: L.

    Returns:
      {"tokens" [B,L] int32, "mask" [B,L] True on real tokens, "loss_mask" [B,L] True on what is learned
      of the response}.

    Raises:
      ValueError: a row that is longer than length, or one without a response token that is predicted from another,
        whose loss mask would be empty; the row is named.
    """
    tokens = np.zeros((len(rows), length), np.int32)
    mask, loss_mask = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for b, row in enumerate(rows):
        both = [*row.prompt, *row.response]
        if len(both) > length:
            raise ValueError(f"{row.where}: expected at most {length} tokens, found {len(both)}")
        if not row.response or len(both) < 2:
            raise ValueError(f"{row.where}: expected a response token after another token, found an empty loss mask")
        tokens[b, : len(both)], mask[b, : len(both)] = both, True
        loss_mask[b, len(row.prompt) : len(both)] = True if row.learned is None else row.learned
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}


def pad_pairs(rows: Sequence[PairTokens], *, length: int) -> dict[str, dict[str, np.ndarray]]:
    """Pairs as right-padded arrays: {"chosen", "rejected"}, each as `pad_texts` makes it. ValueErrors as there."""
    return {
        side: pad_texts(
            [TextTokens(row.prompt, getattr(row, side), row.where, learned=row.learned[i]) for row in rows],
            length=length,
        )
        for i, side in enumerate(("chosen", "rejected"))
    }


# Tokens ---------------------------------------------------------------------------------------------------------------


def _load(found: Rows[Row], convert: Callable[[Row], Any], skip_bad: bool) -> Loaded:
    rows: list[Any] = []
    skipped, reasons = found.skipped, list(found.reasons)
    for row in found.rows:
        try:
            rows.append(convert(row))
        except _BadRow as error:
            where = getattr(row, "where", "")
            if not skip_bad:
                raise ValueError(f"{where}: {error}") from None
            skipped += 1
            reasons += [f"{where}: {error}"] * (len(reasons) < 20)
    if not rows:
        raise ValueError(f"data: expected at least one good row, found none ({skipped} bad); the first: {reasons[0]}")
    return Loaded(rows, skipped, reasons)


def _written(prompt: Text, response: Text, tokenizer: Any) -> tuple[str, str]:
    """(the prompt's text, the response's), of messages with what the template writes about them."""
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("data: expected a tokenizer with a chat template for lists of messages, found none")
    try:
        return tokenization.render_response(tokenizer, prompt, response)  # type: ignore[arg-type]
    except ValueError as error:
        raise _BadRow(str(error)) from error


def _prompt_ids(tokenizer: Any, text: str, templated: bool, *, empty: bool = False) -> list[int]:
    """The tokenizer adds its special tokens (a BOS) unless a template has; an empty prompt keeps those alone."""
    ids = tokenization.prompt_ids(tokenizer, text, templated=templated)
    if not ids and not empty:
        raise _BadRow("expected a prompt token, found none")
    return ids


def _response_ids(tokenizer: Any, text: str, eos_id: int | None, templated: bool) -> list[int]:
    try:
        return tokenization.response_ids(tokenizer, text, eos_id, templated=templated)
    except ValueError as error:
        raise _BadRow("expected a response token, found an empty loss mask") from error


def _cut(prompt: list[int], response: int, max_length: int) -> list[int]:
    """The prompt's last tokens, so that the row fits."""
    room = max_length - response
    if room < 1:
        raise _BadRow(
            f"expected a response of at most {max_length - 1} tokens, found {response} (max_length {max_length})"
        )
    return prompt[-room:]

"""Preference pairs, texts and prompts as token ids and as padded arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from jaxalign.data import readers
from jaxalign.data.encoded import (
    Learn,
    Loaded,
    OnLong,
    PairTokens,
    TextTokens,
    encode_examples,
    encode_pairs,
    encode_prompts,
)
from jaxalign.data.rows import Row, Rows
from jaxalign.tokens import TextFormat


def tokenize_pairs(
    source: str | os.PathLike[str],
    form: TextFormat,
    *,
    max_length: int,
    on_long: OnLong = "cut",
    skip_bad: bool = False,
    tail: bool = False,
    **reading: Unpack[readers.PairReading],
) -> Loaded:
    """Reads preference pairs as token ids, by the rules of `jaxalign.tokens`.

    Args:
      source: files, folders or data sets, as `readers.read_pairs` takes them.
      form: how texts become tokens (`tokens.text_format`).
      max_length, on_long, tail: as in `encoded.encode_pairs`.
      skip_bad: leaves bad rows out and counts them.
      reading: further arguments of `readers.read_pairs`: columns, as_messages, compare, safer, score.

    Returns:
      Loaded, whose rows are `PairTokens`.

    Raises:
      ValueError: a bad row (its file, line and reason), a file of another kind, or one without a good row.
    """
    found = readers.read_pairs(source, skip_bad=skip_bad, **reading)
    made = encode_pairs(found.rows, form, max_length=max_length, on_long=on_long, skip_bad=skip_bad, tail=tail)
    return _with_reading(made, found)


def tokenize_texts(
    source: str | os.PathLike[str],
    form: TextFormat,
    *,
    max_length: int,
    on_long: OnLong = "cut",
    skip_bad: bool = False,
    learn: Learn = "all",
    **reading: Unpack[readers.ExampleReading],
) -> Loaded:
    """Reads texts to learn as token ids; of a preference pair the chosen response.

    Args:
      source, form, skip_bad: as in `tokenize_pairs`.
      max_length, on_long, learn: as in `encoded.encode_examples`.
      reading: further arguments of `readers.read_examples`: columns, as_messages, safer, score.

    Returns:
      Loaded, whose rows are `TextTokens`.

    Raises:
      ValueError: as in `tokenize_pairs`.
    """
    found = readers.read_examples(source, skip_bad=skip_bad, **reading)
    made = encode_examples(found.rows, form, max_length=max_length, on_long=on_long, skip_bad=skip_bad, learn=learn)
    return _with_reading(made, found)


def tokenize_prompts(
    source: str | os.PathLike[str],
    form: TextFormat,
    *,
    max_length: int | None = None,
    on_long: OnLong = "error",
    skip_bad: bool = False,
    **reading: Unpack[readers.PromptReading],
) -> Loaded:
    """Reads prompts as token ids.

    Args:
      source, form, skip_bad: as in `tokenize_pairs`.
      max_length, on_long: as in `encoded.encode_prompts`.
      reading: further arguments of `readers.read_prompts`: columns, as_messages.

    Returns:
      Loaded, whose rows are `Prompt`.

    Raises:
      ValueError: as in `tokenize_pairs`.
    """
    found = readers.read_prompts(source, skip_bad=skip_bad, **reading)
    made = encode_prompts(found.rows, form, max_length=max_length, on_long=on_long, skip_bad=skip_bad)
    return _with_reading(made, found)


def _with_reading(made: Loaded, found: Rows[Row]) -> Loaded:
    """The encoded rows with what was left out while reading."""
    reasons = [*found.reasons, *made.reasons][:20]
    counts = {f"{kind} (not read)": n for kind, n in found.counts.items()} | dict(made.counts)
    return made._replace(skipped=found.skipped + made.skipped, reasons=reasons, counts=counts)


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

    found = readers.read_strings(source, columns=columns, skip_bad=skip_bad)
    texts: list[str] = []
    skipped, reasons = found.skipped, list(found.reasons)
    for row in found.rows:
        plain = [text for text in row.texts if isinstance(text, str)]
        if len(plain) == len(row.texts):
            texts += plain
            continue
        reason = f"{row.where}: expected text, found lists of messages"
        if not skip_bad:
            raise ValueError(reason)
        skipped += 1
        reasons += [reason] * (len(reasons) < 20)
    if not texts:
        raise ValueError(f"data: expected at least one good row, found none ({skipped} bad); the first: {reasons[0]}")
    return Loaded(texts, skipped, reasons)


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

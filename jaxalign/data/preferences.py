"""Preference pairs and texts from files, in the usual forms, as token ids and as padded arrays.

A row is read by its fields:

- {"prompt", "chosen", "rejected"}: text; the responses go on where the prompt ends.
- {"chosen", "rejected"}: whole transcripts in the form of hh-rlhf, split at the last "Assistant:" turn.
- the same two with lists of chat messages, through the tokenizer's template.
- for supervised training also {"prompt", "response"}, {"prompt", "completion"}, {"text"}, {"messages"}.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data import tokens as tokenization
from jaxalign.data.encoded import Loaded as Loaded
from jaxalign.data.encoded import PairTokens as PairTokens
from jaxalign.data.encoded import TextTokens as TextTokens
from jaxalign.data.files import raw_lines

TURN = "\n\nAssistant:"
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


class Pair(NamedTuple):
    """Text of a preference."""

    prompt: str
    """The prompt that both responses answer."""
    chosen: str
    """The preferred response."""
    rejected: str
    """The other response."""
    templated: bool = False
    """Whether a chat template has written the special tokens."""


class Text(NamedTuple):
    """A text to learn."""

    prompt: str
    """The text before the response; "" where there is none."""
    response: str
    """The text to learn."""
    templated: bool = False
    """Whether a chat template has written the special tokens."""


class _BadRow(Exception):
    """A row that cannot be used, and why."""


def tokenize_pairs(
    path: str | pathlib.Path, tokenizer: Any, *, eos_id: int | None, max_length: int, skip_bad: bool = False
) -> Loaded:
    """Reads the preference pairs of a file as token ids.

    Prompt and response are tokenized apart, so that the boundary between them is exact.

    Args:
      path: a .jsonl, .jsonl.gz or .parquet file.
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

    def convert(where: str, row: dict[str, Any]) -> PairTokens:
        pair = _pair(row, tokenizer)
        prompt = _prompt_ids(tokenizer, pair.prompt, pair.templated)
        both = [_response_ids(tokenizer, r, eos_id, pair.templated) for r in (pair.chosen, pair.rejected)]
        if both[0] == both[1]:
            raise _BadRow("expected two responses that differ, found the same tokens twice")
        return PairTokens(_cut(prompt, max(map(len, both)), max_length), both[0], both[1], where, pair.prompt)

    return _load(pathlib.Path(path), convert, skip_bad)


def tokenize_texts(
    path: str | pathlib.Path, tokenizer: Any, *, eos_id: int | None, max_length: int, skip_bad: bool = False
) -> Loaded:
    """Reads the texts of a file as token ids; of a preference pair the chosen response.

    Args:
      path, tokenizer, eos_id, max_length, skip_bad: as in `tokenize_pairs`; a text without a prompt that is too long
        loses its end.

    Returns:
      Loaded, whose rows are `TextTokens`.

    Raises:
      ValueError: as in `tokenize_pairs`.
    """

    def convert(where: str, row: dict[str, Any]) -> TextTokens:
        text = _text(row, tokenizer)
        prompt = _prompt_ids(tokenizer, text.prompt, text.templated, empty=not text.prompt)
        response = _response_ids(tokenizer, text.response, eos_id, text.templated)
        if not text.prompt:
            return TextTokens(prompt, response[: max_length - len(prompt)], where, text.response)
        return TextTokens(_cut(prompt, len(response), max_length), response, where, text.prompt)

    return _load(pathlib.Path(path), convert, skip_bad)


def read_strings(path: str | pathlib.Path, *, skip_bad: bool = False) -> Loaded:
    """Reads every text of a file, for a tokenizer's training: prompts with their responses.

    Args:
      path, skip_bad: as in `tokenize_pairs`; rows of chat messages are bad.

    Returns:
      Loaded, whose rows are strings.

    Raises:
      ValueError: as in `tokenize_pairs`.
    """

    def convert(where: str, row: dict[str, Any]) -> list[str]:
        if "rejected" in row:
            pair = _pair(row, None)
            return [pair.prompt + pair.chosen, pair.rejected]
        return ["".join(_text(row, None)[:2])]

    found = _load(pathlib.Path(path), convert, skip_bad)
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


# Rows of a file -------------------------------------------------------------------------------------------------------


def _load(file: pathlib.Path, convert: Callable[[str, dict[str, Any]], Any], skip_bad: bool) -> Loaded:
    if not file.name.endswith(SUFFIXES) or not file.is_file():
        found = "no such file" if not file.is_file() else f"suffix {file.suffix!r}"
        raise ValueError(f"data: expected a file that ends in {', '.join(SUFFIXES)}, found {found} at {file}")
    rows: list[Any] = []
    reasons: list[str] = []
    skipped = 0
    for where, row in _rows(file):
        try:
            if isinstance(row, _BadRow):
                raise row
            rows.append(convert(where, row))
        except _BadRow as error:
            if not skip_bad:
                raise ValueError(f"{where}: {error}") from None
            skipped += 1
            reasons += [f"{where}: {error}"] * (len(reasons) < 20)
    if not rows:
        raise ValueError(f"data: expected at least one good row, found none in {file} ({skipped} bad)")
    return Loaded(rows, skipped, reasons)


def _rows(file: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """(file:line, the row as a dict or what is wrong with it)."""
    if file.suffix == ".parquet":
        try:
            from pyarrow import lib, parquet
        except ImportError as error:
            raise ValueError("data: expected pyarrow for .parquet files (pip install 'jaxalign[parquet]')") from error
        try:
            rows = parquet.read_table(file).to_pylist()
        except (lib.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data: expected a Parquet file, found {error} in {file}") from error
        for number, row in enumerate(rows, start=1):
            yield f"{file}:{number}", {k: v for k, v in row.items() if v is not None}
        return
    for number, raw in raw_lines(file):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            if b"\\u" in raw:
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
        except (ValueError, RecursionError) as error:  # of the encoding, of JSON, of its depth
            yield f"{file}:{number}", _BadRow(f"expected JSON, found {error}")
            continue
        if isinstance(row, dict):
            yield f"{file}:{number}", {k: v for k, v in row.items() if v is not None}
        else:
            yield f"{file}:{number}", _BadRow(f"expected a JSON object, found {type(row).__name__}")


def _pair(row: dict[str, Any], tokenizer: Any) -> Pair:
    if "chosen" not in row or "rejected" not in row:
        raise _BadRow(f'expected "chosen" and "rejected", found fields {sorted(row)}')
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _chat_pair(prompt, chosen, rejected, tokenizer)
    for name in ("chosen", "rejected", *(("prompt",) if prompt is not None else ())):
        if not isinstance(row[name], str):
            raise _BadRow(f"expected text in {name}, found {type(row[name]).__name__}")
    if prompt is None:
        (prompt, chosen), (other, rejected) = _turn(chosen, "chosen"), _turn(rejected, "rejected")
        if prompt != other:
            raise _BadRow('expected transcripts that agree up to the last "Assistant:" turn, found two prompts')
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise _BadRow(f"expected a response in {name}, found an empty one")
    return Pair(prompt, chosen, rejected)


def _turn(transcript: str, name: str) -> tuple[str, str]:
    """(prompt with the last "Assistant:", response)."""
    before, turn, after = transcript.rpartition(TURN)
    if not turn:
        raise _BadRow(f'expected a prompt, or a transcript with an "Assistant:" turn, found neither in {name}')
    return before + turn, after


def _chat_pair(prompt: Any, chosen: list[Any], rejected: list[Any], tokenizer: Any) -> Pair:
    if prompt is None:
        if chosen[:-1] != rejected[:-1]:
            raise _BadRow("expected chats that agree up to the last message, found two prompts")
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    if not isinstance(prompt, list) or not prompt or not chosen or not rejected:
        raise _BadRow("expected messages in prompt, chosen and rejected, found an empty or another one")
    start, first = _templated(prompt, chosen, tokenizer)
    return Pair(start, first, _templated(prompt, rejected, tokenizer)[1], True)


def _templated(prompt: list[Any], response: list[Any], tokenizer: Any) -> tuple[str, str]:
    """(the prompt with the template's turn for the response, the response as the template writes it)."""
    if tokenizer is None:
        raise _BadRow("expected text, found lists of messages")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("data: expected a tokenizer with a chat template for lists of messages, found none")
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in (*prompt, *response)):
        raise _BadRow('expected messages as {"role": …, "content": text}')
    if not any(m["content"].strip() for m in response):
        raise _BadRow("expected a response, found an empty message")
    try:
        return tokenization.render_response(tokenizer, prompt, response)
    except ValueError as error:
        raise _BadRow(str(error)) from error


def _text(row: dict[str, Any], tokenizer: Any) -> Text:
    if "chosen" in row:
        pair = _pair(row | {"rejected": row.get("rejected", row["chosen"])}, tokenizer)
        return Text(pair.prompt, pair.chosen, pair.templated)
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise _BadRow("expected messages with a prompt and a response, found fewer than two")
        return Text(*_templated(messages[:-1], messages[-1:], tokenizer), True)
    names = [name for name in ("response", "completion", "text") if name in row]
    if len(names) != 1 or (names == ["text"]) == ("prompt" in row):
        raise _BadRow(f'expected "prompt" with "response", "text", "messages" or a pair, found fields {sorted(row)}')
    prompt, response = row.get("prompt", ""), row[names[0]]
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise _BadRow("expected text in prompt and response")
    if not response.strip():
        raise _BadRow(f"expected text in {names[0]}, found an empty one")
    return Text(prompt, response)


# Tokens ---------------------------------------------------------------------------------------------------------------


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

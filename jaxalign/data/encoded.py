"""Rows in their normal form, texts or chats, as token ids within a length; what is cut or left out is counted."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from jaxalign import tokens
from jaxalign.data.rows import Example, Pair, PromptText
from jaxalign.tokens import NOTES, Encoded, Text, TextFormat

Row = TypeVar("Row")

OnLong: TypeAlias = Literal["cut", "skip", "error"]
"""What is done with a row that is too long: tokens after its header are cut, it is left out, or it is named."""

ON_LONG = ("cut", "skip", "error")

Learn: TypeAlias = Literal["all", "last"]
"""Which of the assistant's turns of a conversation are learned."""


class PairTokens(NamedTuple):
    """A preference as token ids."""

    prompt: list[int]
    """Ids of the prompt; where it is too long it has lost tokens after its header."""
    chosen: list[int]
    """Ids of the preferred response, its end included."""
    rejected: list[int]
    """Ids of the other response, its end included."""
    where: str
    """File and line."""
    split_key: str = ""
    """The uncut prompt, by which rows are split (`split_by_prompt`)."""
    learned: tuple[list[bool] | None, list[bool] | None] = (None, None)
    """Which ids of (chosen, rejected) are the assistant's; None: all."""


class TextTokens(NamedTuple):
    """A text to learn as token ids."""

    prompt: list[int]
    """Ids of the prompt; where it is too long it has lost tokens after its header."""
    response: list[int]
    """Ids of the response, its end included."""
    where: str
    """File and line."""
    split_key: str = ""
    """The uncut prompt, or the response where there is none, by which rows are split (`split_by_prompt`)."""
    learned: list[bool] | None = None
    """Which ids of the response are the assistant's; None: all."""


class Prompt(NamedTuple):
    """A prompt of a file."""

    text: str
    """The text that the model reads; of a chat, the text that its template wrote."""
    tokens: list[int]
    """Its ids, at least one."""
    source: Text = ""
    """The text or the chat as it stands in the file."""
    where: str = ""
    """File and line."""


class Loaded(NamedTuple):
    """Rows as token ids."""

    rows: list[Any]
    """The good rows."""
    skipped: int = 0
    """How many bad rows were left out."""
    reasons: Sequence[str] = ()
    """"file:line: reason" of the first 20 of them."""
    counts: Mapping[str, int] = {}
    """What was cut, left out for its length or noted: name -> number (`describe`)."""
    taught: tuple[int, ...] = ()
    """The ids in which responses end, most frequent first: what has been taught to end generation."""


class BadRow(ValueError):
    """A row that cannot be used, and why."""


def encode_pairs(
    rows: Iterable[Pair],
    form: TextFormat,
    *,
    max_length: int,
    on_long: OnLong = "cut",
    skip_bad: bool = False,
    tail: bool = False,
) -> Loaded:
    """Encodes preference pairs.

    Args:
      rows: in their normal form.
      form: how texts become tokens.
      max_length: of prompt and response together [tokens].
      on_long: what is done with a longer row. A response that leaves no room for a prompt's header and one more token
        makes a bad row.
      skip_bad: leaves bad rows out and counts them.
      tail: whether what a template writes after the end of a response is kept, as reward models read it.

    Returns:
      Loaded, whose rows are `PairTokens`.

    Raises:
      ValueError: a bad row (its file, line and reason), or no good one.
    """

    def convert(row: Pair, count: collections.Counter[str], ends: collections.Counter[int]) -> PairTokens:
        found = [
            _without_end(tokens.encode_pair(form, row.prompt, response), truncated)
            for response, truncated in zip((row.chosen, row.rejected), row.truncated, strict=True)
        ]
        prompt = _common([side.prompt for side in found])
        if not prompt:
            raise BadRow("expected a prompt token, found none")
        sides = [_side(side, len(prompt), tail) for side in found]
        if sides[0][0] == sides[1][0]:
            raise BadRow("expected two responses that differ, found the same tokens twice")
        cut = _cut(prompt, min(found[0].header, len(prompt)), max(len(ids) for ids, _ in sides), max_length, on_long)
        _count(count, ends, found, len(prompt) - len(cut))
        return PairTokens(cut, sides[0][0], sides[1][0], row.where, _key(row.prompt), (sides[0][1], sides[1][1]))

    return _encode(rows, convert, skip_bad)


def encode_examples(
    rows: Iterable[Example],
    form: TextFormat,
    *,
    max_length: int,
    on_long: OnLong = "cut",
    skip_bad: bool = False,
    learn: Learn = "all",
) -> Loaded:
    """Encodes texts to learn.

    Args:
      rows, form, max_length, on_long, skip_bad: as in `encode_pairs`. A text without a prompt that is too long loses
        its end; a conversation loses its first turns after the header.
      learn: of a conversation all of the assistant's turns, or the last.

    Returns:
      Loaded, whose rows are `TextTokens`.

    Raises:
      ValueError: as in `encode_pairs`.
    """

    def convert(row: Example, count: collections.Counter[str], ends: collections.Counter[int]) -> TextTokens:
        if not row.prompt and not isinstance(row.response, str):
            found = tokens.encode_chat(form, row.response, learn=learn)
        else:
            found = tokens.encode_pair(form, row.prompt, row.response)
        found = _without_end(found, row.truncated)
        prompt, key = found.prompt, _key(row.prompt or row.response)
        response, learned = _side(found, len(prompt), False)
        before = len(prompt) + len(response)
        if before > max_length:
            _check_may_cut(before, max_length, on_long)
        if isinstance(row.response, str) and not row.prompt:
            response = response[: max_length - len(prompt)]
        elif before > max_length and learned is not None:
            prompt, response, learned = _cut_chat(found.header, prompt, response, learned, max_length)
        else:
            prompt = _cut(prompt, found.header, len(response), max_length, on_long)
        _count(count, ends, [found], before - len(prompt) - len(response))
        return TextTokens(prompt, response, row.where, key, learned)

    return _encode(rows, convert, skip_bad)


def encode_prompts(
    rows: Iterable[PromptText],
    form: TextFormat,
    *,
    max_length: int | None = None,
    on_long: OnLong = "error",
    skip_bad: bool = False,
) -> Loaded:
    """Encodes prompts.

    Args:
      rows, form, skip_bad: as in `encode_pairs`.
      max_length: the longest prompt [tokens], the model's context less the response's; None: any.
      on_long: what is done with a longer prompt.

    Returns:
      Loaded, whose rows are `Prompt`.

    Raises:
      ValueError: as in `encode_pairs`.
    """

    def convert(row: PromptText, count: collections.Counter[str], ends: collections.Counter[int]) -> Prompt:
        del ends
        found = tokens.encode_prompt(form, row.prompt)
        ids = found.ids if max_length is None else _cut(found.ids, found.header, 0, max_length, on_long)
        _count(count, collections.Counter(), [], len(found.ids) - len(ids))
        return Prompt(tokens.prompt_text(form, row.prompt), ids, row.prompt, row.where)

    return _encode(rows, convert, skip_bad)


def describe(counts: Mapping[str, int]) -> list[str]:
    """The counts of `Loaded` as lines for a reader."""
    lines = []
    if counts.get("cut_rows"):
        lines.append(f"{counts['cut_rows']} rows were cut by {counts['cut_tokens']} tokens in all, after their header")
    if counts.get("long_rows"):
        lines.append(f"{counts['long_rows']} rows were left out, which are longer than the limit")
    known = {name: text for name, text in NOTES.items() if counts.get(f"{name}_rows")}
    return lines + [f"{counts[f'{name}_rows']} rows: {text}" for name, text in known.items()]


class _TooLong(ValueError):
    """A row that is longer than the limit, of a job that does not cut."""

    def __init__(self, found: int, limit: int) -> None:
        super().__init__(f"expected at most {limit} tokens, found {found}")


def _encode(
    rows: Iterable[Row],
    convert: Callable[[Row, collections.Counter[str], collections.Counter[int]], Any],
    skip_bad: bool,
) -> Loaded:
    good: list[Any] = []
    reasons: list[str] = []
    skipped, number = 0, 0
    count: collections.Counter[str] = collections.Counter()
    ends: collections.Counter[int] = collections.Counter()
    for number, row in enumerate(rows, start=1):  # noqa: B007
        where = getattr(row, "where", "")
        try:
            good.append(convert(row, count, ends))
        except _TooLong as error:
            raise ValueError(f"{where}: {error}") from None
        except _Skipped:
            count["long_rows"] += 1
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{where}: {error}") from error
            skipped += 1
            if len(reasons) < 20:
                reasons.append(f"{where}: {error}")
    if not good:
        raise ValueError(f"data: expected at least one good row, found none among {number}" + "".join(reasons[:1]))
    return Loaded(good, skipped, reasons, dict(count), tuple(i for i, _ in ends.most_common()))


class _Skipped(Exception):
    """A row that is left out for its length."""


def _cut(prompt: list[int], header: int, response: int, max_length: int, on_long: OnLong) -> list[int]:
    """The prompt within the room that the response leaves: its header and its last tokens."""
    room = max_length - response
    if len(prompt) <= room:
        return prompt
    _check_may_cut(len(prompt) + response, max_length, on_long)
    if room < header + 1:
        limit = f"(max_length {max_length}, of which the prompt's header takes {header})" if header else ""
        raise BadRow(
            f"expected a response of at most {max_length - header - 1} tokens, found {response} "
            f"{limit or f'(max_length {max_length})'}"
        )
    return [*prompt[:header], *prompt[len(prompt) - (room - header) :]]


def _check_may_cut(found: int, max_length: int, on_long: OnLong) -> None:
    if on_long not in ON_LONG:
        raise ValueError(f"on_long: expected one of {ON_LONG}, found {on_long!r}")
    if on_long == "error":
        raise _TooLong(found, max_length)
    if on_long == "skip":
        raise _Skipped


def _cut_chat(
    header: int, prompt: list[int], response: list[int], learned: list[bool], max_length: int
) -> tuple[list[int], list[int], list[bool]]:
    """(prompt, response, learned) of a conversation whose first turns are cut after the header."""
    ids, mask = [*prompt, *response], [*[False] * len(prompt), *learned]
    keep = max_length - header
    ids, mask = [*ids[:header], *ids[len(ids) - keep :]], [*mask[:header], *mask[len(mask) - keep :]]
    if keep < 1 or True not in mask[1:]:
        raise BadRow(f"expected an assistant's turn within {max_length} tokens, found none")
    first = mask.index(True, 1)
    return ids[:first], ids[first:], mask[first:]


def _without_end(found: Encoded, truncated: bool) -> Encoded:
    """A response that a limit cut, without the end that it did not reach."""
    if not truncated:
        return found
    learned = None if found.learned is None else found.learned[: len(found.response)]
    return found._replace(closing=[], tail=[], learned=learned)


def _side(found: Encoded, prompt: int, tail: bool) -> tuple[list[int], list[bool] | None]:
    """(ids after the common prompt, which of them are learned; None for all)."""
    given = found.prompt[prompt:]
    said = [*found.response, *found.closing]
    after = found.tail if tail else []
    if not given and not after and found.learned is None:
        return said, None
    mask = [*[False] * len(given), *(found.learned or [True] * len(said)), *[False] * len(after)]
    return [*given, *said, *after], mask


def _count(
    count: collections.Counter[str], ends: collections.Counter[int], found: Sequence[Encoded], lost: int
) -> None:
    if lost:
        count["cut_rows"] += 1
        count["cut_tokens"] += lost
    for note in {note for side in found for note in side.notes}:
        count[f"{note}_rows"] += 1
    ends.update(side.closing[-1] for side in found if side.closing)


def _common(prompts: Sequence[list[int]]) -> list[int]:
    n = 0
    for ids in zip(*prompts, strict=False):
        if len(set(ids)) > 1:
            break
        n += 1
    return prompts[0][:n]


def _key(text: Text) -> str:
    """What a row is split by: independent of tokenizer and template."""
    return text if isinstance(text, str) else json.dumps([dict(message) for message in text], sort_keys=True)

"""Preference pairs, texts and prompts, of every form of data, as text or messages and without a tokenizer.

`read_pairs`, `read_examples` and `read_prompts` take the same files; what each makes of a form is in docs/data.md.
"""

from __future__ import annotations

import collections
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias, TypedDict, TypeVar

from jaxalign.data import chats, fields, forms, sources
from jaxalign.data.rows import Content, Example, Pair, PromptText, RowError, Rows
from jaxalign.tokens import Text

Made = TypeVar("Made")
Source: TypeAlias = "str | os.PathLike[str]"
Compare: TypeAlias = Literal["all", "best"]
"""Which responses of a ranked list make pairs: all with different ranks, or the best with each that is worse."""

COMPARE = ("all", "best")


class PromptReading(TypedDict, total=False):
    """Keywords of `read_prompts` beside skip_bad."""

    columns: Mapping[str, str] | None
    as_messages: bool


class ExampleReading(PromptReading, total=False):
    """Keywords of `read_examples` beside skip_bad."""

    safer: bool
    score: str


class PairReading(ExampleReading, total=False):
    """Keywords of `read_pairs` beside skip_bad."""

    compare: Compare


def read_pairs(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    as_messages: bool = False,
    compare: Compare = "all",
    safer: bool = False,
    score: str = "helpfulness",
) -> Rows[Pair]:
    """Reads preference pairs.

    Args:
      source: files, folders or data sets, as `sources.raw_rows` takes them.
      columns: field of `fields.COLUMNS` -> field of the files, with dots into fields and lists.
      skip_bad: leaves bad rows out and counts them.
      as_messages: makes turns of plain text: transcripts are parted at "Human:" and "Assistant:"; another prompt is a
        user's turn and a response an assistant's. Else text stays text.
      compare: which responses of a ranked list, or of rows with one prompt and scores, make pairs.
      safer: of PKU-SafeRLHF the safer response is the preferred one, not the better one.
      score: the field by which rows of one prompt are compared.

    Returns:
      Rows of `Pair`. Responses that are equally good are counted as "tie" and make no pair; a row with a score whose
      prompt no other row has is counted as "single response". Pairs of several rows stand after all others, under the
      file and line of the chosen response.

    Raises:
      ValueError: a bad row (its file, line and reason), nothing under the source's name, or no good row.
    """
    if compare not in COMPARE:
        raise ValueError(f"compare: expected one of {COMPARE}, found {compare!r}")
    groups: dict[str, list[tuple[str, Content]]] = {}
    counts: collections.Counter[str] = collections.Counter()

    def make(where: str, found: Content) -> list[Pair]:
        if len(found.responses) < 2 and not found.grouped:
            raise RowError("no pair", 'expected two responses to compare, as "chosen" and "rejected"')
        _check_responses(found)
        if found.grouped:
            groups.setdefault(json.dumps(found.prompt), []).append((where, found))
            return []
        return list(_pairs([where] * len(found.responses), found, compare, counts))

    def rest() -> Iterator[Pair]:
        for members in groups.values():
            if len(members) < 2:
                counts["single response"] += 1
                continue
            each = [found for _, found in members]
            whole = each[0]._replace(
                responses=tuple(found.responses[0] for found in each),
                scores=tuple(found.scores[0] for found in each),
                truncated=tuple(found.truncated[0] for found in each),
            )
            yield from _pairs([where for where, _ in members], whole, compare, counts)

    content = functools.partial(forms.read_content, safer=safer, score=score)
    return _read(source, make, content, "data", columns, skip_bad, as_messages, counts, rest)


def read_examples(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    as_messages: bool = False,
    safer: bool = False,
    score: str = "helpfulness",
) -> Rows[Example]:
    """Reads texts to learn; of a preference the preferred response, of a ranked list the first of the best.

    Args:
      source, columns, skip_bad, as_messages, safer, score: as in `read_pairs`.

    Returns:
      Rows of `Example`. A preference without a preferred response is counted as "tie", and a response whose label is
      false as "unwanted response"; they make no row.

    Raises:
      ValueError: as `read_pairs`.
    """
    counts: collections.Counter[str] = collections.Counter()

    def make(where: str, found: Content) -> list[Example]:
        if not found.responses:
            raise RowError("no response", 'expected "prompt" with "response", "text", "messages" or a pair')
        if not found.wanted:
            counts["unwanted response"] += 1
            return []
        best = 0
        if len(found.scores) > 1:
            if len(set(found.scores)) == 1:
                counts["tie"] += 1
                return []
            best = max(range(len(found.scores)), key=found.scores.__getitem__)
        response = found.responses[best]
        whole = found.names[0] in (*forms.CONVERSATIONS, "data")
        if whole and len(response) < 2:
            raise RowError("messages", "expected messages with a prompt and a response, found fewer than two")
        _check_response(response, found.names[best])
        truncated = bool(found.truncated) and found.truncated[best]
        if whole or found.prompt is None:
            return [Example(where, "" if isinstance(response, str) else [], response, truncated)]
        return [Example(where, found.prompt, response, truncated)]

    content = functools.partial(forms.read_content, safer=safer, score=score)
    return _read(source, make, content, "data", columns, skip_bad, as_messages, counts)


def read_prompts(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    as_messages: bool = False,
) -> Rows[PromptText]:
    """Reads prompts: of every form of data the prompt, once for each row; of a .txt file each line.

    Args:
      source, columns, skip_bad, as_messages: as in `read_pairs`.

    Returns:
      Rows of `PromptText`. The prompt of a conversation that ends in an assistant's turn is what precedes that turn.

    Raises:
      ValueError: as `read_pairs`, and an empty prompt.
    """

    def make(where: str, found: Content) -> list[PromptText]:
        prompt = found.prompt
        if prompt is None:
            prompt = _before_reply(found)
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise RowError("empty prompt", "expected a prompt, found an empty one")
        return [PromptText(where, prompt)]

    return _read(source, make, forms.read_content, "prompts", columns, skip_bad, as_messages, collections.Counter())


class Strings(NamedTuple):
    """All texts of a row."""

    where: str
    """File and line."""
    texts: list[Text]
    """The prompt with the first response, then the other responses; messages where the row has them."""


def read_strings(source: Source, *, columns: Mapping[str, str] | None = None, skip_bad: bool = False) -> Rows[Strings]:
    """Reads all texts, for instance for a tokenizer's training. Arguments and errors as of `read_pairs`."""

    def make(where: str, found: Content) -> list[Strings]:
        prompt = found.prompt or ""
        if not found.responses:
            raise RowError("no response", "expected a row with a prompt and a response, or a text")
        _check_responses(found)
        first = found.responses[0]
        whole = prompt + first if isinstance(prompt, str) and isinstance(first, str) else first
        return [Strings(where, [whole, *found.responses[1:]])]

    return _read(source, make, forms.read_content, "data", columns, skip_bad, False, collections.Counter())


def _before_reply(found: Content) -> Text:
    """The prompt in a conversation or a transcript."""
    whole = found.responses[0]
    if isinstance(whole, str):
        if not chats.is_transcript(whole) or chats.ASSISTANT not in whole:
            raise RowError("no prompt", 'expected "prompt" (text or messages), "messages" or another form with one')
        return whole[: whole.rindex(chats.ASSISTANT) + len(chats.ASSISTANT)]
    return whole[:-1] if len(whole) > 1 and whole[-1]["role"] == "assistant" else whole


def _read(
    source: Source,
    make: Callable[[str, Content], list[Made]],
    read: Callable[[fields.RawRow], Content],
    name: str,
    columns: Mapping[str, str] | None,
    skip_bad: bool,
    as_messages: bool,
    counts: collections.Counter[str],
    rest: Callable[[], Iterable[Made]] = tuple,
) -> Rows[Made]:
    named = fields.check_columns(columns)
    rows: list[Made] = []
    reasons: list[str] = []
    skipped = 0
    for where, row in sources.raw_rows(source, name=name, lines=name == "prompts"):
        try:
            if isinstance(row, RowError):
                raise row
            found = read(fields.rename(row, named))
            rows += make(where, _as_messages(found) if as_messages else found)
        except RowError as error:
            reason = str(error)
            if not isinstance(row, RowError) and ", found" not in reason:
                reason += f", found fields {sorted(row)!r:.500}"
            if not skip_bad:
                raise ValueError(f"{where}: {reason}") from None
            skipped += 1
            counts[error.kind] += 1
            reasons += [f"{where}: {reason}"] * (len(reasons) < 20)
    rows += rest()
    if not rows:
        what = "prompt" if name == "prompts" else "good row"
        told = "".join(f", {number} {kind}" for kind, number in counts.items())
        first = f"; the first: {reasons[0]}" if reasons else ""
        raise ValueError(f"{name}: expected at least one {what}, found none in {source} ({skipped} bad){told}{first}")
    return Rows(rows, skipped, reasons, dict(counts))


def _pairs(
    places: list[str],
    found: Content,
    compare: Compare,
    counts: collections.Counter[str],
) -> Iterator[Pair]:
    """Pairs of responses whose scores differ, each under the place of the chosen one. Of two equal responses a row is
    bad; in lists and among rows, equal ones make no pair."""
    prompt, scores = found.prompt, found.scores
    assert prompt is not None
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: equal ones as they stand
    for high in order if compare == "all" else order[:1]:
        for low in order[order.index(high) + 1 :]:
            chosen, rejected = found.responses[high], found.responses[low]
            if scores[high] == scores[low]:
                counts["tie"] += 1
            elif chosen == rejected:
                if len(scores) == 2 and not found.grouped:
                    raise RowError(
                        "same responses",
                        "expected two responses that differ, found the same text and so the same tokens twice",
                    )
                counts["same responses"] += 1
            else:
                margin = scores[high] - scores[low] if found.scaled else found.margin
                truncated = (found.truncated[high], found.truncated[low]) if found.truncated else (False, False)
                yield Pair(places[high], prompt, chosen, rejected, margin, truncated)


def _check_responses(found: Content) -> None:
    for name, response in zip(found.names, found.responses, strict=True):
        _check_response(response, name)


def _check_response(response: Text, name: str) -> None:
    if isinstance(response, str):
        if not response.strip():
            what = "text" if name == "text" else "a response"
            raise RowError("empty response", f"expected {what} in {name}, found an empty one")
        return
    said = [message for message in response if message["role"] == "assistant"]
    if not said:
        roles = ", ".join(message["role"] for message in response)
        raise RowError("no assistant turn", f"expected an assistant's turn in {name}, found {roles or 'no turn'}")
    if not any((message["content"] or "").strip() or "tool_calls" in message for message in said):
        raise RowError("empty response", f"expected a response in {name}, found an empty message")


def _as_messages(found: Content) -> Content:
    """The content with turns in the place of plain text."""
    if found.prompt is None:
        whole = found.responses[0]
        if not isinstance(whole, str):
            return found
        if not chats.is_transcript(whole):
            raise RowError("no turns", 'expected turns, "Human:" and "Assistant:", found plain text')
        return found._replace(responses=(chats.prompt_chat(whole),))
    if not isinstance(found.prompt, str):
        return found
    transcript = chats.is_transcript(found.prompt)
    turns = [
        chats.response_chat(text, transcript=transcript) if isinstance(text, str) else text for text in found.responses
    ]
    return found._replace(prompt=chats.prompt_chat(found.prompt), responses=tuple(turns))

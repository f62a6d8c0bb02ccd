"""What jobs read: pairs, texts and prompts of the command line as token ids; and their first rows as a reader sees
them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxalign import models, tokens
from jaxalign.data import encoded, preferences
from jaxalign.data.text_options import (
    CompareOptions,
    TextOptions,
    check_text_options,
    example_reading,
    format_of,
    pair_reading,
    prompt_reading,
)
from jaxalign.tokens import TextFormat
from jaxalign.training.options import RowOptions


def read_pairs(
    source: str,
    form: TextFormat,
    *,
    rows: RowOptions,
    text: TextOptions,
    compare: CompareOptions,
    tail: bool = False,
) -> encoded.Loaded:
    """The preference pairs of --data.

    Args:
      source: files, folders or a data set's name.
      form: how texts become tokens.
      rows: longest row, and whether bad ones are skipped.
      text: how texts and chats are read.
      compare: which responses make a pair.
      tail: whether what a chat template writes after a response is kept, as a reward model reads it.

    Returns:
      Rows of `encoded.PairTokens`.
    """
    return preferences.tokenize_pairs(
        source,
        form,
        max_length=rows.max_length,
        on_long=text.on_long or "cut",
        skip_bad=rows.skip_bad,
        tail=tail,
        **pair_reading(text, compare),
    )


def read_texts(
    source: str,
    form: TextFormat,
    *,
    rows: RowOptions,
    text: TextOptions,
    compare: CompareOptions | None = None,
    learn: encoded.Learn = "all",
) -> encoded.Loaded:
    """The texts of --data: rows of `encoded.TextTokens`; arguments as in `read_pairs`, `learn`: which turns count."""
    return preferences.tokenize_texts(
        source,
        form,
        max_length=rows.max_length,
        on_long=text.on_long or "cut",
        skip_bad=rows.skip_bad,
        learn=learn,
        **example_reading(text, compare),
    )


def read_prompts(source: str, form: TextFormat, *, text: TextOptions, room: int) -> encoded.Loaded:
    """Prompts as token ids: rows of `encoded.Prompt`. One that is longer than `room` is left to the job, or cut or
    skipped where --on-long says so; what is cut or left out is told."""
    found = preferences.tokenize_prompts(
        source,
        form,
        max_length=None if text.on_long is None else room,
        on_long=text.on_long or "error",
        **prompt_reading(text),
    )
    for line in encoded.describe(found.counts):
        print(line, flush=True)
    return found


def show(
    read: Callable[[TextFormat], encoded.Loaded], text: TextOptions, *, model: str, tokenizer: str = ""
) -> dict[str, Any]:
    """Prints the first --show rows of what a job reads, as tokens with their ids, and writes nothing.

    Args:
      read: how texts become tokens -> the job's rows, as the job itself reads them.
      text: the job's options for texts; `show` is the number of rows.
      model: the folder of the model, or "" for one that is new.
      tokenizer: the folder of a new model's tokenizer.

    Returns:
      {}: there is no summary.

    Raises:
      ValueError: as the job's own reading.
    """
    check_text_options(text)
    found = models.tokenizer(model or tokenizer, chat_template=text.chat_template)
    form = format_of(text, found, models.read_config(model).eos_ids if model else ())
    rows, colour = read(form).rows, sys.stdout.isatty()
    for row in rows[: text.show]:
        print(row.where)
        for name, parts in _parts(row, form):
            line = tokens.show_row(found, parts, colour=colour)
            print(f"  {name}: " + line.replace("\n", "\n    "))
    print(f"{len(rows)} rows; {tokens.LEGEND}")
    return {}


def _parts(row: Any, form: TextFormat) -> Iterator[tuple[str, list[tuple[str, list[int]]]]]:
    """(name, parts for `tokens.show_row`) of each side of a row."""
    if isinstance(row, encoded.Prompt):
        yield "prompt", [("given", row.tokens)]
    elif isinstance(row, encoded.TextTokens):
        yield "prompt", [("given", row.prompt)]
        yield "response", _learned(row.response, row.learned, form)
    else:
        yield "prompt", [("given", row.prompt)]
        for side, learned in zip(("chosen", "rejected"), row.learned, strict=True):
            yield side, _learned(getattr(row, side), learned, form)


def _learned(ids: list[int], learned: list[bool] | None, form: TextFormat) -> list[tuple[str, list[int]]]:
    """Runs of learned and other ids; what follows the last learned id is read alone."""
    mask = [True] * len(ids) if learned is None else learned
    last = max((i for i, on in enumerate(mask) if on), default=-1)
    ends = {*form.eos_ids, *form.closing}
    parts: list[tuple[str, list[int]]] = []
    for i, (token, on) in enumerate(zip(ids, mask, strict=True)):
        kind = "read" if i > last else "given" if not on else "end" if token in ends else "learned"
        if not parts or parts[-1][0] != kind:
            parts.append((kind, []))
        parts[-1][1].append(token)
    return parts

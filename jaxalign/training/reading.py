"""What jobs read: pairs, texts and prompts of the command line as token ids; and their first rows as a reader sees
them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jaxalign import models, tokens
from jaxalign.data import encoded, preferences
from jaxalign.data.text_options import (
    TextOptions,
    check_text_options,
    example_reading,
    format_of,
    pair_reading,
    prompt_reading,
)
from jaxalign.tokens import TextFormat

Kind = Literal["pairs", "read pairs", "texts", "prompts"]
"""What a job reads; "read pairs" are those of a reward model, which reads what a template writes after a response."""


def read_pairs(config: Any, form: TextFormat, *, tail: bool = False) -> encoded.Loaded:
    """The preference pairs of --data; tail: with what a chat template writes after a response."""
    return preferences.tokenize_pairs(
        config.data,
        form,
        max_length=config.max_length,
        on_long=config.text.on_long or "cut",
        skip_bad=config.skip_bad,
        tail=tail,
        **pair_reading(config.text, config.compare),
    )


def read_texts(config: Any, form: TextFormat) -> encoded.Loaded:
    """The texts of --data."""
    return preferences.tokenize_texts(
        config.data,
        form,
        max_length=config.max_length,
        on_long=config.text.on_long or "cut",
        skip_bad=config.skip_bad,
        learn=config.learn,
        **example_reading(config.text, config.compare),
    )


def read_prompts(source: str, options: TextOptions, form: TextFormat, *, room: int) -> list[encoded.Prompt]:
    """Prompts as token ids. One that is longer than `room` is left to the job, or cut or skipped where --on-long says
    so; what is cut or left out is told."""
    found = preferences.tokenize_prompts(
        source,
        form,
        max_length=None if options.on_long is None else room,
        on_long=options.on_long or "error",
        **prompt_reading(options),
    )
    for line in encoded.describe(found.counts):
        print(line, flush=True)
    prompts: list[encoded.Prompt] = found.rows
    return prompts


def show(config: Any, kind: Kind, *, model: str) -> dict[str, Any]:
    """Prints the first --show rows of what a job reads, as tokens with their ids, and writes nothing.

    Args:
      config: the job's options.
      kind: what it reads.
      model: the folder of the model, or "" where the tokenizer is that of --tokenizer.

    Returns:
      {}: there is no summary.

    Raises:
      ValueError: as the job's own reading.
    """
    check_text_options(config.text)
    tokenizer = models.tokenizer(model or config.tokenizer, chat_template=config.text.chat_template)
    form = format_of(config.text, tokenizer, models.read_config(model).eos_ids if model else ())
    if kind == "texts":
        rows: Sequence[Any] = read_texts(config, form).rows
    elif kind == "prompts":
        rows = read_prompts(config.prompts, config.text, form, room=_room(config, model))
    else:
        rows = read_pairs(config, form, tail=kind == "read pairs").rows
    colour = sys.stdout.isatty()
    for row in rows[: config.text.show]:
        print(row.where)
        for name, parts in _parts(row, form):
            line = tokens.show_row(tokenizer, parts, colour=colour)
            print(f"  {name}: " + line.replace("\n", "\n    "))
    print(f"{len(rows)} rows; {tokens.LEGEND}")
    return {}


def _room(config: Any, model: str) -> int:
    limit = getattr(config, "max_length", None) or models.read_config(model).max_length
    return int(limit) - int(config.max_new_tokens)


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

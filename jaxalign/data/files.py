"""Prompts from files."""

from __future__ import annotations

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxalign.data import tokens
from jaxalign.data.encoded import Prompt

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


class _Line(NamedTuple):
    where: str  # file:line, for messages
    text: str
    templated: bool  # the chat template has written the special tokens


def read_prompts(path: str | pathlib.Path, *, tokenizer: Any = None) -> list[str]:
    """Reads the prompts of a file as text.

    Args:
      path: a .txt file with a prompt in each line, or a .jsonl or .jsonl.gz file with {"prompt": text} or {"messages":
        [...]} in each line.
      tokenizer: renders messages by its chat template, with the opening of the response; None where there are none.

    Returns:
      The prompts, in the order of the file.

    Raises:
      ValueError: a line that is not UTF-8 or not JSON, that has neither field or both, an empty prompt, messages that
        the template refuses (file, line and reason are named); a file without prompts, or of another kind.
    """
    return [line.text for line in _lines(pathlib.Path(path), tokenizer)]


def tokenize_prompts(path: str | pathlib.Path, tokenizer: Any) -> list[Prompt]:
    """Reads the prompts of a file as text and token ids.

    Args:
      path, tokenizer: as in `read_prompts`. Special tokens are written once: by the tokenizer for text, by the template
        for messages (`tokens.prompt_ids`).

    Returns:
      A Prompt for each line.

    Raises:
      ValueError: as in `read_prompts`, and a prompt without tokens.
    """
    out = []
    for where, text, templated in _lines(pathlib.Path(path), tokenizer):
        ids = tokens.prompt_ids(tokenizer, text, templated=templated)
        if not ids:
            raise ValueError(f"{where}: expected at least one token, found none in {text!r}")
        out.append(Prompt(text, ids))
    return out


def _lines(file: pathlib.Path, tokenizer: Any) -> list[_Line]:
    if not file.name.endswith(SUFFIXES) or not file.is_file():
        found = "no such file" if not file.is_file() else f"suffix {file.suffix!r}"
        raise ValueError(f"prompts: expected a file that ends in {', '.join(SUFFIXES)}, found {found} at {file}")
    plain = file.name.endswith(".txt")
    out = []
    for number, raw in raw_lines(file):
        where = f"{file}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: expected UTF-8, found {error}") from error
        if not line.strip() and not plain:
            continue
        text, templated = (line, False) if plain else _prompt_of(line, where, tokenizer)
        if not text.strip():
            raise ValueError(f"{where}: expected a prompt, found an empty one")
        out.append(_Line(where, text, templated))
    if not out:
        raise ValueError(f"prompts: expected at least one prompt, found none in {file}")
    return out


def raw_lines(file: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of a file. Only newlines part lines: JSON text may hold U+2028 and its
    kind. ValueError for a .gz file that is none."""
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"prompts: expected gzip data, found {error} in {file}") from error
    lines = raw.split(b"\n")
    if lines[-1] == b"":
        lines.pop()  # the end of the last line, not a line of its own
    for number, line in enumerate(lines, start=1):
        yield number, line.removesuffix(b"\r")


def _prompt_of(line: str, where: str, tokenizer: Any) -> tuple[str, bool]:
    """(text, whether it comes from the chat template) of one line of JSON."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, found {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(f'{where}: expected "prompt" (text) or "messages" (a list), found fields {sorted(row)}')
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise ValueError(f"{where}: expected text in prompt, found {type(row['prompt']).__name__}")
        return row["prompt"], False
    try:
        return tokens.render_chat(tokenizer, row["messages"], add_generation_prompt=True), True
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

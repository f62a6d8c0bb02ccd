"""Prompts from files."""

from __future__ import annotations

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxalign.data import tokens

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


class Prompt(NamedTuple):
    """text: what the model reads; tokens: its ids, at least one."""

    text: str
    tokens: list[int]


class _Line(NamedTuple):
    where: str  # file:line, for messages
    text: str
    templated: bool  # the chat template has written the special tokens


def read_prompts(path: str | pathlib.Path, *, tokenizer: Any = None) -> list[str]:
    """Prompts of a .txt file (one per line), or of a .jsonl or .jsonl.gz file with {"prompt": text} or {"messages":
    [...]} in each line; messages go through the tokenizer's chat template with the generation prompt.

    ValueError names file, line number and reason: not UTF-8, not JSON, neither field or both, an empty prompt, messages
    that the template refuses; or a file without prompts.
    """
    return [line.text for line in _lines(pathlib.Path(path), tokenizer)]


def tokenize_prompts(path: str | pathlib.Path, tokenizer: Any) -> list[Prompt]:
    """As `read_prompts`, with token ids.

    Special tokens (a BOS) are the tokenizer's for text and the template's for messages, never both: a second BOS is off
    the model's distribution. ValueError names file and line of a prompt without tokens.
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
    """(number from 1, line without its end). Only newlines part lines: JSON text may hold U+2028 and its kind."""
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

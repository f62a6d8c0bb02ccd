"""Prompts from files."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import Any


def read_prompts(path: str | pathlib.Path, *, tokenizer: Any = None) -> list[str]:
    """Prompts of a .txt file (one per line), or of a .jsonl or .jsonl.gz file with {"prompt": text} or {"messages":
    [...]} in each line; messages go through the tokenizer's chat template with the generation prompt.

    ValueError names file, line number and reason: not JSON, neither field, an empty prompt; or a file without prompts.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"prompts: expected a .txt, .jsonl or .jsonl.gz file, found none at {file}")
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    lines = raw.decode("utf-8").splitlines()
    plain = file.name.endswith(".txt")
    out = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            if plain:
                raise ValueError(f"{file}:{number}: expected a prompt, found an empty line")
            continue
        prompt = line if plain else _prompt_of(line, f"{file}:{number}", tokenizer)
        if not prompt.strip():
            raise ValueError(f"{file}:{number}: expected a prompt, found an empty one")
        out.append(prompt)
    if not out:
        raise ValueError(f"prompts: expected at least one prompt, found none in {file}")
    return out


def _prompt_of(line: str, where: str, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, found {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    if isinstance(row.get("messages"), list):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(f"{where}: expected a tokenizer with a chat template for messages, found none")
        return tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    raise ValueError(f'{where}: expected "prompt" (text) or "messages" (a list), found fields {sorted(row)}')

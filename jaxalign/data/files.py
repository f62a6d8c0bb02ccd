"""Prompts from files as token ids."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jaxalign.data import readers, tokens
from jaxalign.data.encoded import Prompt


def tokenize_prompts(
    source: str | os.PathLike[str], tokenizer: Any, *, columns: Mapping[str, str] | None = None
) -> list[Prompt]:
    """Reads prompts as text and token ids.

    Args:
      source, columns: as in `read_prompts`.
      tokenizer: turns text into ids. Special tokens are written once: by the tokenizer for text, by its chat template,
        with the opening of the response, for messages.

    Returns:
      A Prompt for each row.

    Raises:
      ValueError: as in `read_prompts`, messages that the template refuses, and a prompt without tokens.
    """
    out = []
    for where, prompt in readers.read_prompts(source, columns=columns).rows:
        templated = not isinstance(prompt, str)
        try:
            text = (
                prompt if isinstance(prompt, str) else tokens.render_chat(tokenizer, prompt, add_generation_prompt=True)
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        ids = tokens.prompt_ids(tokenizer, text, templated=templated)
        if not ids:
            raise ValueError(f"{where}: expected at least one token, found none in {text!r}")
        out.append(Prompt(text, ids))
    return out

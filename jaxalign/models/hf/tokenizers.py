"""The tokenizer of a model's folder."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxalign.models.hf.files import local_folder

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder holds one of these, or it has no tokenizer."""


def tokenizer(path: str | pathlib.Path) -> Any:
    """Loads the tokenizer of a folder.

    Args:
      path: a folder with tokenizer files, or "owner/model" on the hub.

    Returns:
      A tokenizer of transformers.

    Raises:
      ValueError: no such folder, or one without tokenizer files.
    """
    folder = local_folder(path)
    if not any((folder / name).exists() for name in FILES):
        raise ValueError(f"tokenizer: expected tokenizer files in the folder, found none in {folder}")
    from transformers import AutoTokenizer  # slow to import, and only needed where text comes in

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)

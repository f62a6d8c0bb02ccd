"""The import of transformers, without its line that PyTorch was not found: nothing here needs it."""

from __future__ import annotations

import logging
from typing import Any


def transformers() -> Any:
    """Imports transformers, which takes a second and is needed where text comes in alone.

    Returns:
      The module. All that it logs is shown as before, but for the advice to install torch.
    """
    logger = logging.getLogger("transformers")
    logger.addFilter(_is_news)
    try:
        import transformers as library
    finally:
        logger.removeFilter(_is_news)
    return library


def _is_news(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()

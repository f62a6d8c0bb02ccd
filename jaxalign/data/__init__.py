"""Prompts, preference data and the embedded world."""

from jaxalign.data.files import Prompt, read_prompts, tokenize_prompts
from jaxalign.prompts import bucket, prompt_batch

__all__ = ["Prompt", "bucket", "prompt_batch", "read_prompts", "tokenize_prompts"]

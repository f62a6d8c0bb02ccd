"""Data from files, as token ids and arrays.

`files` reads prompts, `preferences` pairs and texts; `batches` puts rows in an order that is a function of the seed;
`tokenizers` makes tokenizers of text, and `tokens` is the one place that decides on special tokens and templates.
"""

from jaxalign.data.encoded import Prompt
from jaxalign.data.files import read_prompts, tokenize_prompts
from jaxalign.prompts import bucket, prompt_batch

__all__ = ["Prompt", "bucket", "prompt_batch", "read_prompts", "tokenize_prompts"]

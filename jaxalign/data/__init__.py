"""Data from files: rows as text or chats, and as token ids and arrays.

`read_pairs`, `read_examples` and `read_prompts` read data as it is found (`sources` opens it, `forms` knows its fields)
without a tokenizer; `preferences` makes token ids and arrays; `batches` puts rows in an order that is a
function of the seed; `tokenizers` makes tokenizers of text.
"""

from jaxalign.data.encoded import Prompt
from jaxalign.data.fields import parse_columns
from jaxalign.data.preferences import tokenize_pairs, tokenize_prompts, tokenize_texts
from jaxalign.data.readers import read_examples, read_pairs, read_prompts
from jaxalign.data.rows import Example, Pair, PromptText, Rows

__all__ = [
    "Example",
    "Pair",
    "Prompt",
    "PromptText",
    "Rows",
    "parse_columns",
    "read_examples",
    "read_pairs",
    "read_prompts",
    "tokenize_pairs",
    "tokenize_prompts",
    "tokenize_texts",
]

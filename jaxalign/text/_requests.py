"""What every function of texts checks, tokenizes and batches on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxalign import _hosts, models
from jaxalign._checks import check_rng
from jaxalign.prompts import prompt_batch
from jaxalign.tokens import Messages, TextFormat, Tokenizer, encode_prompt, text_format
from jaxalign.types import Array, TokenBatch

Prompt: TypeAlias = str | Messages
"""A text, or a chat [{"role": …, "content": …}, …]."""


class Batch(NamedTuple):
    """Some of the prompts, padded to one width; the last prompt may be repeated to fill it up."""

    rows: list[int]
    """The prompts' numbers, without those that fill up."""
    source: np.ndarray
    """[B]: the prompt's number in each row of the batch."""
    prompts: TokenBatch
    """Their tokens [B,P]; index is the prompt's number."""


def check_prompts(prompts: Any) -> list[Prompt]:
    """The prompts as a list. ValueError: a single text or chat, none at all, an empty one, something else."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts: expected a list of texts, found one text {prompts!r:.80}; put it in a list")
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts: expected a list of texts or chats, found {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts: expected at least one, found none")
    if all(isinstance(prompt, Mapping) for prompt in prompts):
        raise ValueError("prompts: expected a list of chats, found the messages of one chat; put it in a list")
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"prompts[{row}]: expected a text, found an empty one")
        elif not isinstance(prompt, list | tuple):
            raise ValueError(f"prompts[{row}]: expected a text or a list of messages, found {type(prompt).__name__}")
    return list(prompts)


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int | None) -> None:
    """ValueError for a tokenizer whose ids are not all the model's (vocab_size None: any)."""
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ValueError(f"tokenizer: expected a tokenizer, as of models.tokenizer, found {type(tokenizer).__name__}")
    if vocab_size is not None:
        models.check_rows(tokenizer, vocab_size)


def format_of(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any] | None,
    system: str | None,
    closing: Sequence[int] | None = None,
) -> TextFormat:
    """The format of the texts. ValueError for what concerns chats alone where no prompt is a chat."""
    for name, value in (("chat_template_kwargs", options), ("system", system)):
        if value and all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{name}: expected chats among the prompts, found texts alone and {value!r}")
    return text_format(tokenizer, closing=closing, system=system, template_options=options)


def check_count(name: str, value: Any) -> None:
    """ValueError unless value is an integer, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer, at least 1, found {value!r}")


def key_of(rng: Array | None, seed: int | None) -> Array:
    """The key `rng`, or one made of seed (0 when None). ValueError where both are given, or an rng that is no key."""
    if rng is None:
        return jax.random.key(0 if seed is None else seed)
    if seed is not None:
        raise ValueError(f"seed: expected None beside rng, found {seed!r}")
    check_rng(rng, hint="; seed= takes an integer")
    return rng


def prompt_ids(form: TextFormat, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, by `tokens.encode_prompt`. ValueError naming the row."""
    out = []
    for row, prompt in enumerate(prompts):
        try:
            out.append(encode_prompt(form, prompt).ids)
        except ValueError as error:
            raise ValueError(f"prompts[{row}]: {error}") from error
    return out


def batches(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[Batch]:
    """Prompts of like length together, at most batch_size of them; all in their order where they fit in one batch."""
    rows = list(range(len(sequences)))
    alone = len(rows) <= batch_size
    if not alone:
        rows.sort(key=lambda row: len(sequences[row]))
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        size = len(part) if alone else batch_size
        source = np.asarray(part + [part[-1]] * (size - len(part)))
        yield Batch(part, source, prompt_batch([sequences[row] for row in part], index=part, batch_size=size))


def in_order(parts: Sequence[Any], found: Sequence[Batch]) -> Any:
    """Trees of arrays [B,...], one for each batch, joined to [N,...] in the order of the prompts."""
    order = np.argsort(np.concatenate([batch.rows for batch in found]))
    counts = [len(batch.rows) for batch in found]
    kept = [jax.tree.map(lambda x, n=n: x[:n], _hosts.host_value(part)) for part, n in zip(parts, counts, strict=True)]
    return jax.tree.map(lambda *leaves: jax.numpy.asarray(np.concatenate(leaves)[order]), *kept)

"""Texts of completions, whole or as they grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from jaxalign import _hosts
from jaxalign.text._requests import Batch
from jaxalign.tokens import Tokenizer, byte_tokens, decode_text, settled_text
from jaxalign.types import Completions

Watch: TypeAlias = Callable[[Completions, bool], None]
"""Called with the next tokens of a batch [B,steps], and whether they are the last."""


class Stream(Protocol):
    """Receives the response of a prompt as it grows: `text` goes on where the last one of this row ended."""

    def __call__(self, row: int, text: str, /) -> object: ...


def without_end(ids: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """The ids before the EOS that ended a response: it may be any token, and it is no text."""
    return ids[:-1] if ids and ids[-1] in eos_ids else ids


def texts_of(tokenizer: Tokenizer, completions: Completions, eos_ids: tuple[int, ...]) -> list[list[str]]:
    """The texts of completions [N,n,T]."""
    tokens, mask = _hosts.host_value((completions.tokens, completions.mask))
    return [
        [
            decode_text(tokenizer, without_end(row[real].tolist(), eos_ids))
            for row, real in zip(samples, valid, strict=True)
        ]
        for samples, valid in zip(tokens, mask, strict=True)
    ]


def watch_texts(stream: Stream, tokenizer: Tokenizer, eos_ids: tuple[int, ...], batch: Batch) -> Watch:
    """Gives the caller's stream what is settled of each row's text, and at its end the rest."""
    byte_ids = byte_tokens(tokenizer)
    ids: list[list[int]] = [[] for _ in batch.rows]
    given = [""] * len(batch.rows)

    def watch(drawn: Completions, last: bool) -> None:
        tokens, mask, finished = _hosts.host_value((drawn.tokens, drawn.mask, drawn.finished))
        for b, row in enumerate(batch.rows):
            new = tokens[b][mask[b]].tolist()
            ids[b] += new
            if not new and not last:
                continue
            text = without_end(ids[b], eos_ids)
            now = decode_text(tokenizer, text) if last or finished[b] else settled_text(tokenizer, text, byte_ids)
            if len(now) > len(given[b]) and now.startswith(given[b]):
                stream(row, now[len(given[b]) :])
                given[b] = now

    return watch

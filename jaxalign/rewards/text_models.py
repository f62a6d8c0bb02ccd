"""Reward models that read texts through a tokenizer and a chat template of their own: of any family, any vocabulary."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts
from jaxalign.prompts import bucket
from jaxalign.rewards.values import host_values
from jaxalign.tokens import Encoded, Messages, Text, TextFormat, encode_pair
from jaxalign.types import Params, Reward

KEPT = 1 << 16  # values of texts that have been scored; a text and its number take some hundred bytes


class SourceReward(Protocol):
    """A reward of prompts as they were given: (sources, responses) -> one number per response."""

    def __call__(self, sources: Sequence[Text], responses: Sequence[str]) -> np.ndarray: ...


def text_model(
    reward: Reward,
    params: Params,
    form: TextFormat,
    *,
    max_length: int,
    batch_size: int = 16,
    turns: Callable[[str], Messages] | None = None,
) -> SourceReward:
    """Makes a reward of texts of a reward model with a tokenizer of its own.

    A text is scored as its authors score it: the whole conversation as the model's own chat template writes it, closed
    and with all that the template writes after the end. A prompt in plain text is a user's turn where the tokenizer has
    a template. Each text is scored once, and texts of like length share a batch.

    Args:
      reward: a Reward over the ids of form's tokenizer (`from_model`).
      params: its parameters.
      form: the reward model's own tokenizer and template (`tokens.text_format`).
      max_length: the model's context [tokens]. A longer text loses tokens of its prompt after the header, with a
        warning.
      batch_size: texts that are read together.
      turns: makes a chat of a prompt in plain text, for instance of a transcript; None: one user's turn.

    Returns:
      f(sources, responses) -> [N] rewards, at least float32: a host function. sources: texts or chats, as
      `from_text(..., sources=)` hands them on.

    Raises:
      ValueError: when it is used, texts that the template refuses or a response longer than the context; its row is
        named.
    """
    program = jax.jit(functools.partial(reward, params))
    kept: dict[tuple[str, str], float] = {}

    def score(sources: Sequence[Text], responses: Sequence[str]) -> np.ndarray:
        keys = [(repr(source), response) for source, response in zip(sources, responses, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in kept}
        if len(kept) + len(new) > KEPT:
            kept.clear()
            new = {key: i for i, key in enumerate(keys)}
        rows = {
            key: _encode(form, as_messages(form, sources[i], turns), responses[i], max_length, i)
            for key, i in new.items()
        }
        order = sorted(rows, key=lambda key: len(rows[key][0]))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            arrays = _pad([rows[key] for key in part], batch_size if len(order) > batch_size else len(part))
            values = _hosts.host_value(host_values(program(*arrays), (arrays[0].shape[0],), function=reward))
            kept.update(zip(part, values.tolist(), strict=False))
        return np.asarray([kept[key] for key in keys], np.dtype(jnp.result_type(float)))

    score.on_host = True  # type: ignore[attr-defined]  # as `values.on_host` asks
    score.across = any(map(_hosts.is_spread, jax.tree.leaves(params)))  # type: ignore[attr-defined]
    return score


def as_messages(form: TextFormat, source: Text, turns: Callable[[str], Messages] | None = None) -> Text:
    """A plain text as a chat where the format's tokenizer has a chat template, else the text itself."""
    if not isinstance(source, str) or getattr(form.tokenizer, "chat_template", None) is None:
        return source
    message: Messages = [{"role": "user", "content": source}]
    return message if turns is None else turns(source)


def _encode(form: TextFormat, source: Text, response: str, max_length: int, row: int) -> tuple[list[int], int]:
    """(ids of the whole text within max_length, how many of them are the prompt's)."""
    try:
        found = encode_pair(form, source, response, allow_empty=True)
    except ValueError as error:
        raise ValueError(f"reward: row {row}: {error}") from error
    said = [*found.response, *found.closing, *found.tail]
    prompt = _fit(found, max_length - len(said), row)
    return [*prompt, *said], len(prompt)


def _fit(found: Encoded, room: int, row: int) -> list[int]:
    if len(found.prompt) <= room:
        return found.prompt
    if room < found.header + 1:
        raise ValueError(
            f"reward: row {row}: expected room for the prompt's header of {found.header} tokens in the reward model's "
            f"context, found {max(room, 0)} beside the response"
        )
    warnings.warn(
        "reward: some texts are longer than the reward model's context; tokens after the prompt's header are left out",
        stacklevel=2,
    )
    return [*found.prompt[: found.header], *found.prompt[len(found.prompt) - (room - found.header) :]]


def _pad(rows: Sequence[tuple[list[int], int]], size: int) -> tuple[Any, Any, Any, Any]:
    """(tokens [B,L], mask [B,L], prompt_length [B], index [B]), right-padded; the last row fills the batch up."""
    filled = [*rows, *[rows[-1]] * (size - len(rows))]
    tokens = np.zeros((size, bucket(max(len(ids) for ids, _ in filled))), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for b, (ids, _) in enumerate(filled):
        tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
    return tokens, mask, np.asarray([n for _, n in filled], np.int32), np.arange(size, dtype=np.int32)

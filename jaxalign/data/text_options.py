"""Options of every command that reads texts or chats, and what they make of a tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from jaxalign import tokens
from jaxalign._files import once_each
from jaxalign.data.encoded import OnLong
from jaxalign.data.fields import parse_columns
from jaxalign.data.readers import Compare, ExampleReading, PairReading, PromptReading


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts and chats are read and become tokens."""

    columns: str = ""
    """Where the files hold what: prompt=FIELD,chosen=FIELD,rejected=FIELD,response=FIELD,…; dots go into fields."""
    as_messages: bool = False
    """Make turns of plain text: a prompt is a user's turn, "Human:" and "Assistant:" part a transcript."""
    on_long: OnLong | None = None
    """A row that is too long is cut after its header (BOS and system turn), skipped, or an error; by default data to
    learn from is cut and a prompt to decode is an error."""
    system: str = ""
    """System turn of chats that have none."""
    chat_template_kwargs: str = ""
    """Arguments of the chat template as JSON: {"enable_thinking": false}."""
    chat_template: str = ""
    """Name of one of the tokenizer's chat templates, where it has several; by default the one named "default"."""
    eos_token: str = ""
    """Token that ends a response in plain text, or its id, in place of the tokenizer's EOS."""
    show: int = 0
    """Print the first N rows as tokens with their ids, and what of them is learned or read, and stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Which responses of a data set make a pair."""

    compare: Compare = "all"
    """Of a ranked list: all responses of different ranks, or the best with each that is worse."""
    safer: bool = False
    """Of PKU-SafeRLHF: the safer response is preferred, not the better one."""
    score: str = "helpfulness"
    """Field by which rows of one prompt are compared."""


def check_text_options(options: TextOptions) -> None:
    """ValueErrors that name the option; what needs no file."""
    parse_columns(options.columns)
    template_options(options)
    if options.show < 0:
        raise ValueError(f"show: expected at least 0, found {options.show}")


def template_options(options: TextOptions) -> dict[str, Any]:
    """The arguments of the chat template. ValueError for what is no JSON object."""
    if not options.chat_template_kwargs:
        return {}
    try:
        found = json.loads(options.chat_template_kwargs, object_pairs_hook=once_each)
    except ValueError as error:
        raise ValueError(
            f"chat_template_kwargs: expected a JSON object, found {options.chat_template_kwargs!r} ({error})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"chat_template_kwargs: expected a JSON object, found {options.chat_template_kwargs!r}")
    return found


def format_of(options: TextOptions, tokenizer: Any, eos_ids: Sequence[int] = ()) -> tokens.TextFormat:
    """The format of a command's texts.

    Args:
      options: the command's.
      tokenizer: the model's.
      eos_ids: the ids at which the model's generation ends.

    Raises:
      ValueError: an EOS token that the tokenizer does not have, and options as `check_text_options` says.
    """
    closing = None
    if options.eos_token:
        closing = (token_id(tokenizer, options.eos_token),)
        eos_ids = tuple(dict.fromkeys((*closing, *eos_ids)))
    return tokens.text_format(
        tokenizer,
        eos_ids=eos_ids,
        closing=closing,
        system=options.system or None,
        template_options=template_options(options),
    )


def ending_ids(
    options: TextOptions, tokenizer: Any, eos_ids: Sequence[int], prompts: Iterable[tokens.Text]
) -> tuple[int, ...]:
    """The ids that end a response to these prompts, of which those that the model does not name are printed.

    Args:
      options: the command's.
      tokenizer: the model's.
      eos_ids: the ids at which the model's generation ends.
      prompts: texts and chats as they were given.

    Returns:
      eos_ids (the tokenizer's EOS where the model names none), the token of --eos-token, and, where a prompt is a chat,
      the special token in which the chat template ends an assistant's turn.
    """
    form = format_of(options, tokenizer, eos_ids)
    found = tokens.ends_of_reply(form, prompts, (*eos_ids, *form.eos_ids))
    if added := found[len(set(eos_ids)) :]:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in added)
        print(f"responses end in {names} too, beside the model's EOS ids {list(eos_ids)}", flush=True)
    return found


def token_id(tokenizer: Any, token: str) -> int:
    """The id of a token by its text or its number. ValueError where the tokenizer has none."""
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return int(vocabulary[token])
    if token.isdecimal() and int(token) in set(vocabulary.values()):
        return int(token)
    raise ValueError(f"eos_token: expected a token of the tokenizer or its id, found {token!r}")


def prompt_reading(options: TextOptions) -> PromptReading:
    """Keywords of `tokenize_prompts`."""
    return {"columns": parse_columns(options.columns), "as_messages": options.as_messages}


def example_reading(options: TextOptions, compare: CompareOptions | None = None) -> ExampleReading:
    """Keywords of `tokenize_texts`. ValueError where it is said which responses make pairs: there are none."""
    compare = CompareOptions() if compare is None else compare
    if compare.compare != "all":
        raise ValueError(
            f"compare: expected 'all', since a text to learn is compared with none, found {compare.compare!r}"
        )
    return {
        "columns": parse_columns(options.columns),
        "as_messages": options.as_messages,
        "safer": compare.safer,
        "score": compare.score,
    }


def pair_reading(options: TextOptions, compare: CompareOptions) -> PairReading:
    """Keywords of `tokenize_pairs`."""
    return {
        "columns": parse_columns(options.columns),
        "as_messages": options.as_messages,
        "safer": compare.safer,
        "score": compare.score,
        "compare": compare.compare,
    }

"""How texts and chats become token ids, and ids texts: the one place that decides on special tokens and templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.tokens import Messages


def render_chat(
    tokenizer: Any,
    messages: Any,
    *,
    add_generation_prompt: bool,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The text that the tokenizer's chat template makes of messages; it holds the special tokens.

    Args:
      tokenizer: one with a chat template.
      messages: [{"role": …, "content": …}, …].
      add_generation_prompt: whether the turn of the response is opened at the end.
      options: further arguments of the template, for instance {"enable_thinking": False}.

    Raises:
      ValueError: what are no messages, a tokenizer without a chat template, messages that the template refuses.
    """
    if not isinstance(messages, list | tuple) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f'expected messages as [{{"role": …, "content": …}}, …], found {messages!r}')
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("expected a tokenizer with a chat template for messages, found none")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **(options or {})
        )
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        raise ValueError(f"expected messages that the chat template accepts, found {error}") from error
    return str(text)


def render_response(
    tokenizer: Any, prompt: Messages, response: Messages, *, options: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """(the prompt with the template's opening of the response, the response as the template writes it).

    Raises:
      ValueError: as `render_chat`, and a template that changes the prompt's text before a response.
    """
    start = render_chat(tokenizer, prompt, add_generation_prompt=True, options=options)
    whole = render_chat(tokenizer, [*prompt, *response], add_generation_prompt=False, options=options)
    if not whole.startswith(start):
        raise ValueError("expected a chat template that keeps the prompt's text before a response, found another text")
    return start, whole[len(start) :]


def prompt_ids(tokenizer: Any, text: str, *, templated: bool) -> list[int]:
    """Token ids of a prompt.

    Special tokens (a BOS) are the tokenizer's for plain text and the template's for a rendered chat (templated), never
    both: a second BOS is off the model's distribution.
    """
    return [int(i) for i in tokenizer(text, add_special_tokens=not templated)["input_ids"]]


def response_ids(
    tokenizer: Any, text: str, eos_id: int | None, *, templated: bool, allow_empty: bool = False
) -> list[int]:
    """Token ids of a response that ends in one EOS; eos_id None: nothing is appended.

    In a rendered chat (templated) the response ends at its first EOS: some templates write a newline after it. An empty
    response that ends in an EOS is one that a model may give; allow_empty takes it, which data to learn from may not
    hold.

    Raises:
      ValueError: no token besides EOS, or with allow_empty no token at all.
    """
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    while eos_id is not None and ids[-2:] == [eos_id, eos_id]:
        ids.pop()
    if eos_id is None or ids[-1:] == [eos_id]:
        closed = ids
    elif templated and eos_id in ids:
        closed = ids[: ids.index(eos_id) + 1]
    else:
        closed = [*ids, eos_id]
    if not (closed if allow_empty else [i for i in ids if i != eos_id]):
        raise ValueError("expected a response token, found none")
    return closed

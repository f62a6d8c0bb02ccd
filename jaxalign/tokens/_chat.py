"""The text that a chat template makes of messages, and where in it each turn stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign import _time_limits
from jaxalign.tokens._format import Messages, TextFormat

# Stands in for a turn's content, so that what the template writes around it can be found. Letters alone: templates may
# strip, split or escape what they are given.
_MARK = "QzxMarkerxzQ"


TEMPLATE_SECONDS = 10.0
"""What a template, a program of whoever wrote the folder, may take for one chat."""


class Turn(NamedTuple):
    """An assistant's turn in the text of a whole conversation [characters]."""

    start: int
    """Where the model would begin to write: after the opening that the template writes for generation."""
    content_end: int
    """Where the content ends and what the template writes after it begins."""


def check_messages(messages: Any) -> Messages:
    """The messages themselves. ValueError for what are none."""
    if not isinstance(messages, list | tuple) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f'expected messages as [{{"role": …, "content": …}}, …], found {messages!r:.200}')
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f'expected a "role" in message {number}, found fields {sorted(message)}')
    return messages


def with_system(form: TextFormat, messages: Messages) -> Messages:
    """Gives the chat with the format's system turn, where it has none of its own.

    Args:
      form: the format.
      messages: the chat.

    Returns:
      The chat.
    """
    if form.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": form.system}, *messages]


def render(form: TextFormat, messages: Messages, *, open_reply: bool) -> str:
    """The text that the chat template makes of messages; it holds the template's special tokens.

    Args:
      form: its tokenizer has a chat template.
      messages: the chat. form.system is its first turn where it has no system turn.
      open_reply: whether the opening of the assistant's next turn is written at the end.

    Raises:
      ValueError: what are no messages, a tokenizer without a template, messages that the template refuses.
    """
    check_messages(messages)
    if getattr(form.tokenizer, "chat_template", None) is None:
        raise ValueError("expected a tokenizer with a chat template for messages, found none")
    messages = with_system(form, messages)
    try:
        text = _time_limits.within(
            lambda: form.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=open_reply, **form.template_options
            ),
            TEMPLATE_SECONDS,
        )
    except _time_limits.TimeLimit as error:
        raise ValueError(f"expected a chat template that ends, found none within {error.seconds:g} s") from None
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        raise ValueError(f"expected messages that the chat template accepts, found {error!s:.500}") from error
    return str(text)


def render_prompt(form: TextFormat, messages: Messages) -> str:
    """The text of a prompt: the conversation with the opening of the assistant's turn.

    A chat whose last turn is the assistant's is a beginning of the response, which goes on where its content ends.
    """
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        return render(form, messages, open_reply=True)
    marked = _with_content(messages, len(messages) - 1, f"{_content(messages[-1])}{_MARK}")
    before, found, _ = render(form, marked, open_reply=False).rpartition(_MARK)
    if not found:
        raise ValueError("expected a chat template that writes an assistant's last turn, found one that drops it")
    return before


def header_text(form: TextFormat, messages: Messages) -> str:
    """What the template writes before the first turn that is not the system's: kept where a prompt is cut."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), None)
    if first is None:
        return ""
    marked = _with_content(messages, first, f"{_MARK}{_content(messages[first])}")
    try:
        before, found, _ = render(form, marked, open_reply=False).partition(_MARK)
    except ValueError:  # a template may demand a form of the content that the mark breaks
        return ""
    return before if found else ""


def reply_opening(form: TextFormat, prompt: Messages) -> tuple[str, bool]:
    """The prompt's text before a reply in a conversation, and whether the one for generation goes further.

    A template may open more for generation than it writes in a conversation (`<think>` and a newline): what is taught
    then begins where the conversation's own opening ends. ValueError for a template that changes the prompt.
    """
    asked = render_prompt(form, prompt)
    if prompt[-1]["role"] == "assistant":
        return asked, False
    marked = [*prompt, {"role": "assistant", "content": _MARK}]
    written, found, _ = render(form, marked, open_reply=False).rpartition(_MARK)
    if not found:
        raise ValueError("expected a chat template that writes an assistant's turn, found one that drops it")
    if written.startswith(asked):
        return asked, False
    if asked.startswith(written):
        return written, True
    raise ValueError("expected a chat template that keeps the prompt's text before a response, found another text")


def assistant_turns(form: TextFormat, messages: Messages, text: str) -> tuple[list[Turn], int]:
    """The assistant's turns in the text of a conversation, and how many were not found.

    A turn is not found where the template writes it in another form than the conversation alone would show, for
    instance an earlier turn whose thoughts it leaves out.

    Args:
      form, messages: as `render` takes them.
      text: `render(form, messages, open_reply=False)`.
    """
    found, lost = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _span(form, messages, i, text)
        if span is None:
            lost += 1
            continue
        start, end = span
        opened = render(form, messages[:i], open_reply=True) if i else ""
        # What generation is given is not learned; where it is given more than the conversation holds, the content is.
        if text.startswith(opened) and len(opened) <= start:
            start = len(opened)
        found.append(Turn(start, end))
    return found, lost


def _span(form: TextFormat, messages: Messages, i: int, text: str) -> tuple[int, int] | None:
    """(start, end) of message i's content in the text, None where marks about it change the rest of the text."""
    content = _content(messages[i])
    for written in dict.fromkeys((content, content.strip())):
        try:
            marked = render(form, _with_content(messages, i, f"{_MARK}{written}{_MARK}"), open_reply=False)
        except ValueError:
            return None
        parts = marked.split(_MARK)
        if len(parts) == 3 and "".join(parts) == text:
            return len(parts[0]), len(parts[0]) + len(parts[1])
    return None


def tail_text(form: TextFormat, messages: Messages, text: str) -> str | None:
    """What the template writes after the content of the last turn, None where that cannot be found."""
    span = _span(form, messages, len(messages) - 1, text)
    if span is not None:
        return text[span[1] :]
    marked = _with_content(messages, len(messages) - 1, _MARK)
    after = render(form, marked, open_reply=False).rpartition(_MARK)[2]
    return after if text.endswith(after) else None


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _with_content(messages: Messages, i: int, content: str) -> list[Mapping[str, Any]]:
    return [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]

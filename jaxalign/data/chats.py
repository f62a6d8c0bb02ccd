"""Messages and transcripts in one form: roles and contents, turns of plain text, the common beginning of two chats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jaxalign.data.rows import RowError

Chat: TypeAlias = list[dict[str, Any]]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""A role as files write it, in lower case -> the role that it is read as."""

# Fields of a message that chat templates read; others (ids, times) would only make equal turns differ.
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

_MARKS = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
# HelpSteer2 writes its first turn bare, and "<extra_id_1>User" or "<extra_id_1>Assistant" before the others.
_EXTRA = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def read_chat(value: Any, field: str) -> Chat:
    """Messages in their normal form.

    Args:
      value: a list of {"role", "content"} or {"from", "value"}. A content is text, a list of parts of text, or None
        beside tool calls.
      field: where they stand, for errors.

    Returns:
      [{"role": one of the values of ROLES, "content": text or None, …}, …] with the fields of KEPT.

    Raises:
      RowError: what are no messages, an unknown role, a part that is not text.
    """
    form = 'expected messages as {"role": …, "content": text}'
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if isinstance(value, list | tuple) else type(value).__name__
        raise RowError("messages", f"{form}, found {found} in {field}")
    chat: Chat = []
    for number, message in enumerate(value):
        where = f"message {number} of {field}"
        if not isinstance(message, Mapping):
            raise RowError("messages", f"{form}, found {type(message).__name__} in {where}")
        fields = {name: each for name, each in message.items() if each is not None}
        role = fields.get("role", fields.get("from"))
        if not isinstance(role, str):
            raise RowError("messages", f"{form}, found fields {sorted(fields)!r:.500} in {where}")
        if role.strip().lower() not in ROLES:
            raise RowError("role", f"expected a role among {', '.join(ROLES)}, found {role!r:.200} in {where}")
        content = fields.get("content", fields.get("value"))
        if content is None and "tool_calls" not in fields:
            raise RowError("messages", f"{form}, found no content in {where}")
        entry: dict[str, Any] = {"role": ROLES[role.strip().lower()], "content": _content(content, where)}
        chat.append(entry | {name: fields[name] for name in KEPT if name in fields})
    return chat


def _content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RowError(
            "messages",
            f'expected messages as {{"role": …, "content": text}}, found {type(content).__name__} in {where}',
        )
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            found = f"type {kind!r}" if kind != "text" else type(text).__name__
            raise RowError("part of a message", f"expected parts of text, found {found} in {where}")
        texts.append(text)
    return "".join(texts)


def same_turn(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first.get(name) == second.get(name) for name in ("role", "content", "tool_calls"))


def starts_with(chat: Sequence[Mapping[str, Any]], beginning: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a chat begins with the turns of another."""
    return len(chat) >= len(beginning) and all(map(same_turn, chat, beginning))


def after_system(beginning: Sequence[Mapping[str, Any]], chat: Sequence[Mapping[str, Any]]) -> Chat:
    """The turns of a beginning and of a chat, whose own system turns stand in front. RowError for two that differ."""
    own = next((i for i, message in enumerate(chat) if message["role"] != "system"), len(chat))
    if own and beginning and beginning[0]["role"] == "system":
        if not same_turn(beginning[0], chat[0]):
            raise RowError("two system turns", "expected one system turn, found two that differ")
        beginning = beginning[1:]
    return [dict(message) for message in (*chat[:own], *beginning, *chat[own:])]


def part_chats(chats: Sequence[Chat]) -> tuple[Chat, list[Chat]]:
    """(the common beginning of several chats up to the last place at which the assistant speaks in each, the rests).

    RowError where they share no such place, or where nothing precedes it.
    """
    shared = 0
    while all(len(chat) > shared and same_turn(chat[shared], chats[0][shared]) for chat in chats):
        shared += 1
    places = [
        at for at in range(shared, -1, -1) if all(len(chat) > at and chat[at]["role"] == "assistant" for chat in chats)
    ]
    if places and not places[0]:
        raise RowError(
            "no prompt", "expected messages in prompt, chosen and rejected, found an empty or another one before them"
        )
    if not places:
        raise RowError("two prompts", "expected chats that agree up to an assistant's turn, found two prompts")
    return chats[0][: places[0]], [chat[places[0] :] for chat in chats]


# Plain text -----------------------------------------------------------------------------------------------------------


def is_transcript(text: str) -> bool:
    """Whether a text is written as hh-rlhf's: it begins with "Human:", a blank line before it or none."""
    return text.lstrip("\n").startswith("Human:")


def part_transcripts(transcripts: Mapping[str, str]) -> tuple[str, list[str]]:
    """(the common beginning of transcripts up to the last "Assistant:" at which they still agree, the rests).

    Args:
      transcripts: field -> text.

    Raises:
      RowError: a text without an "Assistant:" turn, one that ends in a "Human:" turn, or no common beginning.
    """
    for name, text in transcripts.items():
        if ASSISTANT not in text:
            raise RowError(
                "no prompt", f'expected a prompt, or a transcript with an "Assistant:" turn, found neither in {name}'
            )
        if text.rfind(HUMAN) > text.rfind(ASSISTANT):
            raise RowError(
                "ends in a Human turn",
                f'expected a transcript that ends in an "Assistant:" turn, found "Human:" in {name}',
            )
    texts = list(transcripts.values())
    shared = _shared(texts)
    # A response may go on about the turn's end: the mark is common where all of it is.
    cut = texts[0].rfind(ASSISTANT, 0, shared)
    if cut < 0:
        raise RowError("two prompts", 'expected transcripts that agree up to an "Assistant:" turn, found two prompts')
    end = cut + len(ASSISTANT)
    return texts[0][:end], [text[end:] for text in texts]


def _shared(texts: Sequence[str]) -> int:
    low, high = min(texts), max(texts)
    for at, (first, second) in enumerate(zip(low, high, strict=False)):
        if first != second:
            return at
    return len(low)


def prompt_chat(text: str) -> Chat:
    """A plain prompt as messages: of a transcript its turns, without the response's opening; else a user's turn."""
    if is_transcript(text):
        return _turns(text)
    parts = _EXTRA.split(text)
    if len(parts) > 1:
        chat = [{"role": "user", "content": parts[0]}]
        chat += [{"role": ROLES_OF[who], "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
        return chat[:-1] if chat[-1] == {"role": "assistant", "content": ""} else chat
    return [{"role": "user", "content": text}] if text else []


def response_chat(text: str, *, transcript: bool) -> Chat:
    """A plain response as messages: the assistant's turn, or the turns where it goes on as a transcript does."""
    return _turns(f"Assistant:{text}") if transcript else [{"role": "assistant", "content": text}]


ROLES_OF = {"Human": "user", "User": "user", "Assistant": "assistant"}


def _turns(text: str) -> Chat:
    parts = _MARKS.split(text.lstrip("\n"))
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    chat = [{"role": ROLES_OF[who], "content": said.strip()} for who, said in pairs]
    return chat[:-1] if len(chat) > 1 and chat[-1] == {"role": "assistant", "content": ""} else chat

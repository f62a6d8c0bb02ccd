"""From texts and chats to token ids: the one place that decides where a prompt, a response and its end are parted.

The rules:

- A text begins with the tokenizer's prefix (BOS) exactly once, whoever wrote it: tokenizer, template or text.
- An end that the tokenizer would add to a text is never written after a prompt.
- A response is what remains of the ids of prompt and response together after the prompt's ids. Where the prompt's ids
  are not their beginning (a tokenizer may join the characters about the boundary), the response is encoded as it stands
  after a neutral character, and the row says `boundary`.
- A response ends once: in a chat by the tokens that the template writes after an assistant's turn, up to the first that
  ends generation; in plain text by the format's closing ids.
- What a template writes after that end (a newline) is the tail: a reward model reads it, and it is never learned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.tokens import _chat
from jaxalign.tokens._format import Messages, Text, TextFormat, raw_ids

BOUNDARY = "boundary"
OPENING = "generation_opening"
LOST_TURNS = "turns_not_found"
INNER_END = "inner_end"
TRAILING = "trailing_turns"
NOTES = {
    BOUNDARY: "the tokenizer joins the prompt's end with the response's beginning; the response was encoded by itself",
    OPENING: "the template opens more for generation than it writes in a conversation, whose form is taught",
    LOST_TURNS: "an earlier assistant turn is written in another form by the template and is not learned",
    INNER_END: "the response holds an id at which generation ends before its end",
    TRAILING: "turns after the assistant's last one are left out",
}
"""What a row may be counted for -> what that says."""


class PromptTokens(NamedTuple):
    """A prompt as token ids."""

    ids: list[int]
    """The ids."""
    header: int
    """How many ids at the beginning are kept where the prompt is cut: BOS and the template's system turn."""


class Encoded(NamedTuple):
    """A prompt with its response as token ids. prompt + response + closing + tail is the whole text."""

    prompt: list[int]
    """Ids that the model is given."""
    header: int
    """How many of them are kept where the prompt is cut."""
    response: list[int]
    """Ids of the response, without its end."""
    closing: list[int]
    """The end of the response, which is learned; its last id ends generation."""
    tail: list[int]
    """What the template writes after the end."""
    learned: list[bool] | None = None
    """Which of response + closing are the assistant's; None: all of them."""
    notes: tuple[str, ...] = ()
    """Keys of NOTES."""


def encode_text(form: TextFormat, text: str) -> list[int]:
    """Gives the ids of a whole text, with the tokenizer's prefix exactly once.

    Args:
      form: the format.
      text: the text.

    Returns:
      The ids.
    """
    return _with_prefix(form, raw_ids(form.tokenizer, text))


def encode_prompt(form: TextFormat, prompt: Text) -> PromptTokens:
    """Token ids of a prompt.

    Args:
      form: the format.
      prompt: a text, or a chat: it ends in the template's opening of the response, or, where the assistant has the last
        turn, in that turn's content.

    Returns:
      PromptTokens, without an end that the tokenizer would add.

    Raises:
      ValueError: no token; what are no messages; messages that the template refuses.
    """
    if isinstance(prompt, str):
        ids = encode_text(form, prompt)
        header = len(form.prefix) if tuple(ids[: len(form.prefix)]) == form.prefix else 0
    else:
        ids = encode_text(form, _chat.render_prompt(form, prompt))
        header = _common(ids, encode_text(form, _chat.header_text(form, prompt)))
    if not ids:
        raise ValueError(f"expected at least one token, found none in {prompt!r:.80}")
    return PromptTokens(ids, header)


def prompt_text(form: TextFormat, prompt: Text) -> str:
    """Gives the text of a prompt: a plain text as it is, of a chat what its template writes.

    Args:
      form: the format.
      prompt: a text, or a list of messages.

    Returns:
      The text.

    Raises:
      ValueError: as of `encode_prompt`.
    """
    return prompt if isinstance(prompt, str) else _chat.render_prompt(form, prompt)


def conversation_text(form: TextFormat, messages: Messages) -> str:
    """Gives the text that the template writes of a whole conversation.

    Args:
      form: the format, of a tokenizer with a template.
      messages: the turns.

    Returns:
      The text.

    Raises:
      ValueError: as of `encode_prompt`.
    """
    return _chat.render(form, messages, open_reply=False)


def turn_end(form: TextFormat) -> tuple[list[int], list[int]]:
    """Gives what the template writes after an assistant's turn.

    Args:
      form: the format.

    Returns:
      (the closing ids, the last of which ends generation; the tail).

    Raises:
      ValueError: a tokenizer without a template.
    """
    found = _reply(form, [{"role": "user", "content": "one"}], {"role": "assistant", "content": "two"})
    return found.closing, found.tail


def chat_end(form: TextFormat) -> int | None:
    """Gives the special token in which the chat template ends an assistant's turn.

    Args:
      form: the format.

    Returns:
      Its id; None for a tokenizer without a template, and for a template that ends a turn in plain text or not at all.
      None, with a warning, for one of which the end cannot be read: it fails on a turn, or ends each in another way.
    """
    if not getattr(form.tokenizer, "chat_template", None):
        return None
    try:
        closing = turn_end(form._replace(closing=()))[0]
    except ValueError as error:
        warnings.warn(
            f"chat_template: the end of an assistant's turn cannot be read ({error}): responses to chats end at the "
            "EOS ids alone",
            stacklevel=2,
        )
        return None
    return closing[-1] if closing and closing[-1] in {*form.eos_ids, *form.specials} else None


def ends_of_reply(form: TextFormat, prompts: Iterable[Text], eos_ids: Sequence[int]) -> tuple[int, ...]:
    """Gives the ids that end a response to prompts.

    Args:
      form: the format.
      prompts: texts and chats.
      eos_ids: the ids that end a response to a text.

    Returns:
      eos_ids, each once, and, where a prompt is a chat, `chat_end`.
    """
    end = None if all(isinstance(prompt, str) for prompt in prompts) else chat_end(form)
    return tuple(dict.fromkeys((*eos_ids, *(() if end is None else (end,)))))


def encode_pair(form: TextFormat, prompt: Text, response: Text, *, allow_empty: bool = False) -> Encoded:
    """Token ids of a prompt and a response.

    Args:
      form: the format.
      prompt: a text, "" for none, or a chat.
      response: a text; or a chat that goes on where the prompt's chat ends, and whose assistant turns are learned. A
        text in reply to a chat is an assistant's turn, or goes on with the one that the prompt ends in.
      allow_empty: takes a response without a token, which a model may give and which nothing can be learned from.

    Returns:
      Encoded.

    Raises:
      ValueError: a response without a token; a chat in reply to a text; as `encode_prompt`.
    """
    if isinstance(prompt, str):
        if not isinstance(response, str):
            raise ValueError("expected a text in reply to a text, found messages")
        found = _plain(form, prompt, response)
    else:
        replies = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
        _chat.check_messages(replies)
        if not prompt or len(replies) != 1 or replies[0]["role"] != "assistant":
            return encode_chat(form, [*prompt, *replies], learn_from=len(prompt))
        found = _reply(form, prompt, replies[0])
    return found if allow_empty else _checked(found)


def encode_chat(form: TextFormat, messages: Messages, *, learn: str = "all", learn_from: int = 0) -> Encoded:
    """Token ids of a conversation, of which the assistant's turns are learned.

    Args:
      form: the format.
      messages: the conversation; turns after the assistant's last are left out.
      learn: "all" assistant turns, or the "last".
      learn_from: turns before this number are not learned.

    Returns:
      Encoded; its prompt ends where the first learned turn begins.

    Raises:
      ValueError: no assistant turn that is learned; as `encode_prompt`.
    """
    if learn not in ("all", "last"):
        raise ValueError(f"learn: expected 'all' or 'last', found {learn!r}")
    roles = [message["role"] for message in _chat.check_messages(messages)]
    if "assistant" not in roles[learn_from:]:
        raise ValueError(f"expected an assistant's turn to learn, found roles {roles}")
    last = len(roles) - 1 - roles[::-1].index("assistant")
    kept = list(messages[: last + 1])
    notes = [TRAILING] if last + 1 < len(roles) else []
    final = _reply(form, kept[:-1], kept[-1]) if last else None
    earlier = [i for i in range(learn_from, last) if roles[i] == "assistant"]
    if learn == "last" or not earlier:
        if final is None:
            final = _alone(form, kept[0])
        return _checked(final._replace(notes=(*final.notes, *notes)))
    return _turns(form, kept, learn_from, notes)


def _plain(form: TextFormat, prompt: str, response: str) -> Encoded:
    start = encode_text(form, prompt) if prompt else list(form.prefix)
    body, joined = _continuation(form, start, prompt, response)
    closing = list(form.closing)
    while closing and body[-len(closing) :] == closing:
        body = body[: -len(closing)]  # the text holds its end itself
    notes = (() if joined else (BOUNDARY,)) + _inner(form, body)
    return Encoded(start, min(len(form.prefix), len(start)), body, closing, [], None, notes)


def _reply(form: TextFormat, prompt: Messages, reply: Mapping[str, Any]) -> Encoded:
    """A chat with one assistant turn in reply."""
    opened, less = _chat.reply_opening(form, prompt)
    if prompt[-1]["role"] == "assistant":
        reply = {**prompt[-1], "content": f"{prompt[-1].get('content') or ''}{reply.get('content') or ''}"}
        prompt = prompt[:-1]
    messages = [*prompt, reply]
    whole = _chat.render(form, messages, open_reply=False)
    if not whole.startswith(opened):
        raise ValueError("expected a chat template that keeps the prompt's text before a response, found another text")
    tail = _chat.tail_text(form, messages, whole)
    if tail is None:
        raise ValueError("expected a chat template that writes the same after every response, found another text")
    content = whole[len(opened) : len(whole) - len(tail)]
    start = encode_text(form, opened)
    body, joined = _continuation(form, start, opened, content)
    closing, rest = _end(form, _after(form, opened + content, tail))
    notes = ((OPENING,) if less else ()) + (() if joined else (BOUNDARY,)) + _inner(form, body)
    header = _common(start, encode_text(form, _chat.header_text(form, prompt)))
    return Encoded(start, header, body, closing, rest, None, notes)


def _alone(form: TextFormat, turn: Mapping[str, Any]) -> Encoded:
    """A conversation that begins with the assistant's only turn."""
    whole = _chat.render(form, [turn], open_reply=False)
    tail = _chat.tail_text(form, [turn], whole)
    turns, _ = _chat.assistant_turns(form, [turn], whole)
    if tail is None or not turns:
        raise ValueError("expected a chat template that writes an assistant's turn, found one that changes it")
    opened, content = whole[: turns[0].start], whole[turns[0].start : len(whole) - len(tail)]
    start = encode_text(form, opened) if opened else list(form.prefix)
    body, joined = _continuation(form, start, opened, content)
    closing, rest = _end(form, _after(form, opened + content, tail))
    return Encoded(start, len(start), body, closing, rest, None, () if joined else (BOUNDARY,))


def _turns(form: TextFormat, messages: Messages, learn_from: int, notes: list[str]) -> Encoded:
    """A conversation of which several assistant turns are learned, as the template writes it whole."""
    whole = _chat.render(form, messages, open_reply=False)
    ids = encode_text(form, whole)
    turns, lost = _chat.assistant_turns(form, messages, whole)
    wanted = sum(message["role"] == "assistant" for message in messages[learn_from:])
    # Turns before learn_from come first; those that were not found are counted among them as well.
    turns = turns[max(0, len(turns) - wanted) :]
    if not turns or len(whole) < turns[-1].content_end:
        raise ValueError("expected a chat template that writes an assistant's turn, found one that changes it")
    if lost:
        notes = [*notes, LOST_TURNS]
    learned = [False] * len(ids)
    end = 0
    for number, turn in enumerate(turns):
        first = _common(ids, encode_text(form, whole[: turn.start]))
        stop = _common(ids, encode_text(form, whole[: turn.content_end]))
        limit = _common(ids, encode_text(form, whole[: turns[number + 1].start])) if number + 1 < len(turns) else None
        closing, _ = _end(form, ids[stop:limit], append=False)
        end = stop + len(closing)
        learned[first:end] = [True] * (end - first)
    content = _common(ids, encode_text(form, whole[: turns[-1].content_end]))
    closing, rest = _end(form, ids[content:])
    begin = learned.index(True)
    mask = [*learned[begin:content], *[True] * len(closing)]
    header = min(begin, _common(ids, encode_text(form, _chat.header_text(form, messages))))
    return _checked(Encoded(ids[:begin], header, ids[begin:content], closing, rest, mask, tuple(notes)))


def _with_prefix(form: TextFormat, ids: list[int]) -> list[int]:
    prefix = list(form.prefix)
    if not prefix:
        return ids
    while ids[: 2 * len(prefix)] == [*prefix, *prefix]:  # a template and a text that both write it
        ids = ids[len(prefix) :]
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]


def _continuation(form: TextFormat, start: Sequence[int], before: str, text: str) -> tuple[list[int], bool]:
    """(ids of text where it goes on after `before`, whose ids are start; whether they are those of both together)."""
    whole = encode_text(form, before + text)
    # A text may be lost in the prompt's last token (an unknown word that goes on): it is encoded by itself then.
    if whole[: len(start)] == list(start) and (len(whole) > len(start) or not text):
        return whole[len(start) :], True
    # A sentencepiece tokenizer puts a space before a text that stands alone; after a neutral character it does not.
    for neutral in ("\n", "a", "."):
        alone, both = raw_ids(form.tokenizer, neutral), raw_ids(form.tokenizer, neutral + text)
        if both[: len(alone)] == alone:
            return both[len(alone) :], False
    return raw_ids(form.tokenizer, text), False


def _after(form: TextFormat, before: str, text: str) -> list[int]:
    """Ids of what a template writes after a response."""
    return _continuation(form, encode_text(form, before), before, text)[0] if text else []


def _end(form: TextFormat, ids: Sequence[int], *, append: bool = True) -> tuple[list[int], list[int]]:
    """(the ids up to the first that ends generation, the rest) of what a template writes after a response.

    Where none is of the model's EOS ids, the first special token ends the turn (a base model with a chat's template);
    where there is none either, the format's closing ids are appended.
    """
    for ends in (form.eos_ids, form.specials):
        at = next((k for k, i in enumerate(ids) if i in ends), None)
        if at is not None:
            return list(ids[: at + 1]), list(ids[at + 1 :])
    return ([*ids, *form.closing], []) if append else ([], list(ids))


def _inner(form: TextFormat, ids: Sequence[int]) -> tuple[str, ...]:
    return (INNER_END,) if any(i in form.eos_ids for i in ids) else ()


def _checked(found: Encoded) -> Encoded:
    if not found.response:
        raise ValueError("expected a response token, found none")
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share at their beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n

"""From the fields of a row, as data sets have them, to what it holds: a prompt, and responses with their order.

Each function reads one form; `read_content` finds the form by the names of the fields. docs/data.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data import chats
from jaxalign.data.fields import (
    PROMPTS,
    RawRow,
    dicts_in,
    is_number,
    label_in,
    list_in,
    number_in,
    string_in,
    truth_in,
)
from jaxalign.data.rows import Content, RowError
from jaxalign.tokens import Text

RESPONSES = ("response", "completion", "output", "answer")
CONVERSATIONS = ("messages", "conversations", "conversation")
"""The names under which rows have a whole conversation."""


def read_content(row: RawRow, *, safer: bool = False, score: str = "helpfulness") -> Content:
    """Finds the form of a row and reads it.

    Args:
      row: without fields that are None.
      safer: of PKU-SafeRLHF the safer response is the preferred one, not the better one.
      score: the field by which rows of one prompt are compared.

    Returns:
      Content.

    Raises:
      RowError: a form that is not known, or a field that does not hold what the form has there.
    """
    fields = row.keys()
    if "chosen" in fields:
        return pair(row)
    if {"conversation_a", "conversation_b"} <= fields:
        return arena(row)
    if {"human_ref_A", "human_ref_B"} <= fields:
        return shp(row)
    if {"response_0", "response_1"} <= fields:
        return safe_rlhf(row, "safer_response_id" if safer else "better_response_id")
    if {"response1", "response2"} <= fields or {"response_1", "response_2"} <= fields:
        return helpsteer(row)
    if "answers" in fields and "prompt" in fields:
        return nectar(row)
    if "summaries" in fields:
        return summaries(row)
    if "completions" in fields and "instruction" in fields:
        return ultrafeedback(row)
    if fields & set(CONVERSATIONS):
        return conversation(row)
    if "data" in fields and not fields & {*PROMPTS, "text"}:
        return dialogue(row)
    return text(row, score)


def pair(row: RawRow) -> Content:
    """chosen and rejected, with or without a prompt; texts or messages on either side. A row without rejected holds
    one response, which is not compared."""
    sides = {name: _text_or_chat(row[name], name) for name in ("chosen", "rejected") if name in row}
    prompt = _prompt(row)
    if prompt == "" and all(isinstance(side, str) and chats.is_transcript(side) for side in sides.values()):
        prompt = None
    if "conversations" in row and prompt is None:
        prompt = chats.read_chat(list_in(row, "conversations"), "conversations")
    prompt = _with_system(row, prompt)
    prompt, responses = _join(prompt, sides)
    truncated = tuple(_truncated(row, f"{name}_truncated") for name in sides)
    if len(sides) < 2:
        return Content(prompt, responses, (), tuple(sides), truncated=truncated)
    margin = [row.get(f"score_{name}") for name in sides]
    if all(isinstance(each, int | float | str) for each in margin):
        # The order is that of the sides, whatever the scores say: theirs is the difference.
        high, low = (number_in(each, f"score_{name}") for name, each in zip(sides, margin, strict=True))
        return Content(prompt, responses, (1.0, 0.0), tuple(sides), margin=high - low, truncated=truncated)
    return Content(prompt, responses, (1.0, 0.0), tuple(sides), truncated=truncated)


def _truncated(row: RawRow, name: str) -> bool:
    """Whether a limit cut a response, as a row of a model's own samples may say."""
    return bool(truth_in(row, name, "type"))


def _join(prompt: Text | None, sides: Mapping[str, Text]) -> tuple[Text, tuple[Text, ...]]:
    """(prompt, responses) in one form, texts or messages, whose common beginning belongs to the prompt."""
    if all(isinstance(side, str) for side in sides.values()) and (prompt is None or isinstance(prompt, str)):
        texts = {name: str(side) for name, side in sides.items()}
        if prompt is not None:
            return str(prompt), _unrepeated(str(prompt), texts)
        start, ends = chats.part_transcripts(texts)
        return start, tuple(ends)
    lists = [[dict(message) for message in side] for side in sides.values() if not isinstance(side, str)]
    given = _given(prompt, lists)
    for repeated in (given[at:] for at in range(len(given))):  # the lists may repeat the prompt, or its last turns
        if all(chats.starts_with(chat, repeated) and len(chat) > len(repeated) for chat in lists):
            lists = [chat[len(repeated) :] for chat in lists]
            break
    if given and given[-1]["role"] == "user" and any(chat[0]["role"] == "user" for chat in lists):
        raise RowError(
            "prompt beside other messages", "expected messages that go on after the prompt, found another user's turn"
        )
    if not given and prompt is None and len(lists) < len(sides):
        given, lists = lists[0][:-1], [lists[0][-1:]]  # a text beside messages stands in the place of their last turn
    rest = iter(lists)
    answers = [[{"role": "assistant", "content": s}] if isinstance(s, str) else next(rest) for s in sides.values()]
    found, responses = chats.part_chats([chats.after_system(given, answer) for answer in answers])
    return found, tuple(responses)


def _given(prompt: Text | None, lists: Sequence[chats.Chat]) -> chats.Chat:
    """The prompt as messages; [] where the lists hold it themselves, or there is none."""
    if not isinstance(prompt, str):
        return [dict(message) for message in prompt or ()]
    asked = [[(m["content"] or "").strip() for m in chat if m["role"] == "user"] for chat in lists]
    if not lists or not any(asked):
        return chats.prompt_chat(prompt)
    if all(asked) and (not prompt.strip() or all(prompt.strip() in said for said in asked)):
        return []
    raise RowError(
        "prompt beside other messages",
        "expected the prompt to be a user's message of the chats beside it, found another text",
    )


def _unrepeated(prompt: str, texts: Mapping[str, str]) -> tuple[str, ...]:
    """The responses without the prompt, where both are transcripts that begin with it."""
    if not all(chats.is_transcript(side) for side in texts.values()):
        return tuple(texts.values())
    if all(side.startswith(prompt) for side in texts.values()) and chats.is_transcript(prompt):
        return tuple(side[len(prompt) :] for side in texts.values())
    raise RowError(
        "prompt beside other transcripts", "expected transcripts that begin with the prompt, found another beginning"
    )


def arena(row: RawRow) -> Content:
    """Chatbot Arena: conversation_a, conversation_b, winner."""
    names = ("conversation_a", "conversation_b")
    prompt, rest = chats.part_chats([chats.read_chat(list_in(row, name), name) for name in names])
    winner = row.get("winner")
    if not isinstance(winner, str) or not (winner in ("model_a", "model_b") or winner.startswith(("tie", "both"))):
        raise RowError("label", f'expected "model_a", "model_b" or "tie…" in winner, found {winner!r:.200}')
    return Content(prompt, tuple(rest), (float(winner == "model_a"), float(winner == "model_b")), names)


def shp(row: RawRow) -> Content:
    """Stanford Human Preferences: history, human_ref_A, human_ref_B, labels (1: A is preferred)."""
    names = ("human_ref_A", "human_ref_B")
    first = label_in(row, "labels", (0, 1))
    return Content(string_in(row, "history"), tuple(string_in(row, n) for n in names), (first, 1 - first), names)


def safe_rlhf(row: RawRow, label: str) -> Content:
    """PKU-SafeRLHF: prompt, response_0, response_1 and which of them is better or safer."""
    names = ("response_0", "response_1")
    second = label_in(row, label, (0, 1))
    return Content(string_in(row, "prompt"), tuple(string_in(row, n) for n in names), (1 - second, second), names)


def helpsteer(row: RawRow) -> Content:
    """HelpSteer3: context, response1, response2, overall_preference; or HelpSteer2's preferences: prompt, response_1,
    response_2, preference_strength; both from -3 (the first is much better) to 3 (the second)."""
    third = "response1" in row
    names = ("response1", "response2") if third else ("response_1", "response_2")
    second = label_in(row, "overall_preference" if third else "preference_strength", range(-3, 4))
    scores = (-second / 2, second / 2)
    texts = tuple(string_in(row, name) for name in names)
    if not third:
        return Content(string_in(row, "prompt"), texts, scores, names, scaled=True)
    replies = tuple([{"role": "assistant", "content": reply}] for reply in texts)
    return Content(chats.read_chat(list_in(row, "context"), "context"), replies, scores, names, scaled=True)


def nectar(row: RawRow) -> Content:
    """Nectar: prompt, and answers with their ranks, of which 1 is the best."""
    answers = dicts_in(row, "answers")
    ranks = tuple(-number_in(answer.get("rank"), f"answers.{i}.rank") for i, answer in enumerate(answers))
    found = tuple(string_in(answer, "answer", f"answers.{i}.") for i, answer in enumerate(answers))
    return Content(string_in(row, "prompt"), found, ranks, tuple(f"answers.{i}" for i in range(len(found))))


def ultrafeedback(row: RawRow) -> Content:
    """UltraFeedback before it was made pairs: instruction, and completions with response and overall_score."""
    answers = dicts_in(row, "completions")
    scores = tuple(
        number_in(answer.get("overall_score"), f"completions.{i}.overall_score") for i, answer in enumerate(answers)
    )
    found = tuple(string_in(answer, "response", f"completions.{i}.") for i, answer in enumerate(answers))
    names = tuple(f"completions.{i}" for i in range(len(found)))
    return Content(string_in(row, "instruction"), found, scores, names, scaled=True)


def summaries(row: RawRow) -> Content:
    """Summarize from feedback: info.post (or info.article), summaries with a text, choice. The prompt is written as its
    authors did: SUBREDDIT, TITLE and POST where they are given, and "TL;DR:"."""
    info = row.get("info")
    if not isinstance(info, Mapping):
        raise RowError("type", f"expected fields in info, found {type(info).__name__}")
    names = ("subreddit", "title", "post" if info.get("post") is not None else "article")
    heads = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": "Article: "}
    parts = [heads[name] + info[name] for name in names if isinstance(info.get(name), str)]
    if not isinstance(info.get(names[-1]), str):
        raise RowError("type", f"expected text in info.post or info.article, found fields {sorted(info)!r:.500}")
    both = dicts_in(row, "summaries")
    found = tuple(string_in(each, "text", f"summaries.{i}.") for i, each in enumerate(both))
    chosen = label_in(row, "choice", range(len(found)))
    scores = tuple(float(i == chosen) for i in range(len(found)))
    return Content("\n\n".join([*parts, "TL;DR:"]), found, scores, tuple(f"summaries.{i}" for i in range(len(found))))


def conversation(row: RawRow) -> Content:
    """A whole conversation, under one of its names; beside a prompt that is its first user message."""
    name = next(name for name in CONVERSATIONS if name in row)
    if "prompt" in row and not row[name]:
        raise RowError("fields", f"expected messages beside the prompt, found fields {sorted(row)!r:.500} without one")
    chat = chats.read_chat(list_in(row, name), name)
    if system := _system(row):
        chat = chats.after_system(system, chat)
    if "prompt" not in row:
        return Content(None, (chat,), (), (name,))
    first = next((i for i, message in enumerate(chat) if message["role"] == "user"), None)
    asked = row["prompt"]
    if first is None or not isinstance(asked, str) or (chat[first]["content"] or "").strip() != asked.strip():
        raise RowError(
            "prompt beside other messages",
            f"expected the prompt to be the first user message of {name}, found fields {sorted(row)!r:.500} that "
            "disagree",
        )
    return Content(chat[: first + 1], (chat,), (), (name,))


def dialogue(row: RawRow) -> Content:
    """UltraChat before it was made messages: data, a list of texts of the user and the assistant in turn."""
    turns = list_in(row, "data")
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise RowError("type", "expected a list of texts in data")
    roles = ("user", "assistant")
    return Content(None, ([{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],), (), ("data",))


def text(row: RawRow, score: str) -> Content:
    """A prompt with or without a response, or a text. With a score, or with a label that is true or false, the response
    is one of several to its prompt."""
    prompt = _prompt(row)
    names = [name for name in RESPONSES if name in row]
    if prompt is None and names == [] and "text" in row:
        whole = row["text"]
        if not isinstance(whole, str):
            raise RowError("type", f"expected text in text, found {type(whole).__name__}")
        return Content(None, (whole,), (), ("text",))
    if prompt is None:
        raise RowError("fields", f"expected a row of a known form, found fields {sorted(row)!r:.500}")
    if len(names) != 1 or "text" in row:
        return Content(_with_system(row, prompt))  # the prompt is clear, what answers it is not
    value = row[names[0]]
    if not isinstance(value, str | list | tuple):
        raise RowError(
            "type", f"expected text in prompt and response, or messages, found {type(value).__name__} in {names[0]}"
        )
    given, answers = _join_reply(_with_system(row, prompt) or "", _text_or_chat(value, names[0]))
    whole = Content(given, (answers,), (), (names[0],), truncated=(_truncated(row, "truncated"),))
    label = truth_in(row, "label", "label")
    whole = whole._replace(wanted=label is not False)
    if score in row:
        return whole._replace(scores=(number_in(row[score], score),), scaled=True, grouped=True)
    if label is not None:
        return whole._replace(scores=(float(label),), grouped=True)
    if is_number(row.get("score")):  # else a mark of another kind, which compares nothing
        return whole._replace(scores=(number_in(row["score"], "score"),), scaled=True, grouped=True)
    return whole


def _join_reply(prompt: Text, response: Text) -> tuple[Text, Text]:
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    found, (rest,) = _join(prompt, {"response": response})
    return found, rest


# Fields ---------------------------------------------------------------------------------------------------------------


def _prompt(row: RawRow) -> Text | None:
    """The prompt, under one of its names; Alpaca's instruction is followed by its input."""
    names = [name for name in PROMPTS if name in row]
    if len(names) > 1:
        raise RowError("fields", f"expected one prompt (columns say which), found fields {sorted(row)!r:.500}")
    if not names:
        return None
    prompt = _text_or_chat(row[names[0]], names[0])
    more = next((row[name] for name in ("input", "context") if names[0] == "instruction" and name in row), "")
    if not isinstance(more, str) or (more and not isinstance(prompt, str)):
        raise RowError("type", "expected text in instruction and input")
    return f"{prompt}\n\n{more}" if more.strip() else prompt


def _text_or_chat(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return chats.read_chat([value], name)
    if isinstance(value, list | tuple):
        if value and not isinstance(value[0], Mapping):
            raise RowError("type", f"expected messages or text in {name}, found list of {type(value[0]).__name__}")
        if not value:
            raise RowError(
                "messages", f"expected messages in {name}, found an empty or another one than a list of messages"
            )
        return chats.read_chat(value, name)
    raise RowError("type", f"expected messages or text in {name}, found {type(value).__name__}")


def _with_system(row: RawRow, prompt: Text | None) -> Text | None:
    """The prompt with the row's system text, where there is one, as its first message."""
    first = _system(row)
    if not first:
        return prompt
    if prompt is None and any(isinstance(row.get(name), str) for name in ("chosen", "rejected")):
        raise RowError("system beside transcripts", "expected a prompt beside the system text, found transcripts")
    return chats.after_system(first, chats.prompt_chat(prompt) if isinstance(prompt, str) else prompt or ())


def _system(row: RawRow) -> chats.Chat:
    """The row's system text as a message; [] for none."""
    system = string_in(row, "system") if "system" in row else ""
    return [{"role": "system", "content": system}] if system.strip() else []

"""Odd rows of every form, each with what pairs, texts and prompts make of it: rows in their normal form, or the reason
for which it is bad."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.forms import BAD, FINE, HH, HI, MORE, NO, YES, assistant, system, user


class Bad(NamedTuple):
    """A row that is named."""

    reason: str
    """A part of the reason."""


class Odd(NamedTuple):
    """A row and what becomes of it. A reader gives a list: [] where the row makes none and is counted."""

    row: Any
    """The row, or the bytes of its line."""
    pairs: list[tuple[Any, Any, Any]] | Bad
    """(prompt, chosen, rejected)."""
    examples: list[tuple[Any, Any]] | Bad
    """(prompt, response)."""
    prompts: list[Any] | Bad
    """The prompts."""


def everywhere(row: Any, reason: str) -> Odd:
    return Odd(row, Bad(reason), Bad(reason), Bad(reason))


NO_PAIR, NO_TEXT = Bad("expected two responses to compare"), Bad('expected "prompt" with "response"')
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
IMAGE = {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": "x.png"}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "1"}

ROWS = [
    # Lines
    everywhere(b"{", "expected JSON"),
    everywhere(b"[" * 5000, "expected JSON"),
    everywhere(b'["prompt"]', "JSON object, found list"),
    everywhere(b'{"prompt": "\xe9"}', "expected JSON, found 'utf-8'"),
    everywhere(rb'{"prompt": "\ud83d"}', "surrogates not allowed"),
    everywhere({}, "found fields []"),
    everywhere({"id": 3, "source": "x"}, "found fields ['id', 'source']"),
    # Text
    Odd({"prompt": "Hi\u2028there", "response": "a\x85b"}, NO_PAIR, [("Hi\u2028there", "a\x85b")], ["Hi\u2028there"]),
    Odd(
        {"prompt": "", "chosen": "Yes", "rejected": "No"},
        [("", "Yes", "No")],
        [("", "Yes")],
        Bad("expected a prompt, found an empty one"),
    ),
    Odd(
        {"prompt": "Hi", "chosen": "Yes", "rejected": "  "},
        Bad("expected a response in rejected, found an empty one"),
        [("Hi", "Yes")],
        ["Hi"],
    ),
    Odd({"prompt": "Hi", "chosen": "Yes"}, NO_PAIR, [("Hi", "Yes")], ["Hi"]),
    Odd({"prompt": "Hi", "chosen": "Yes", "rejected": None}, NO_PAIR, [("Hi", "Yes")], ["Hi"]),
    Odd({"prompt": "Hi", "rejected": "No"}, NO_PAIR, NO_TEXT, ["Hi"]),
    Odd({"prompt": "Hi", "chosen": "Yes", "rejected": "Yes"}, Bad("responses that differ"), [("Hi", "Yes")], ["Hi"]),
    everywhere({"prompt": 3, "chosen": "Yes", "rejected": "No"}, "text in prompt, found int"),
    everywhere({"prompt": "Hi", "chosen": 1, "rejected": 0}, "text in chosen, found int"),
    everywhere({"prompt": "Hi", "chosen": ["Yes"], "rejected": ["No"]}, "text in chosen, found list of str"),
    everywhere({"prompt": "Hi", "instruction": "Ho", "output": "Yes"}, "expected one prompt"),
    Odd({"prompt": "Hi", "response": "a", "completion": "b"}, NO_PAIR, NO_TEXT, ["Hi"]),
    Odd({"text": " "}, NO_PAIR, Bad("expected text in text"), Bad("found fields ['text']")),
    everywhere({"text": ["Hi"]}, "expected text in text, found list"),
    # Transcripts
    everywhere({"chosen": HH + " Yes\n\nHuman: So?", "rejected": HH + " No"}, 'found "Human:" in chosen'),
    everywhere({"chosen": HH + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "found two prompts"),
    everywhere({"chosen": "Yes", "rejected": "No"}, "found neither in chosen"),
    Odd({"chosen": HH, "rejected": HH + " No"}, Bad("empty one"), Bad("expected a response in chosen"), [HH]),
    Odd(
        {"chosen": HH + " Yes\n\nHuman: So?\n\nAssistant: Fine", "rejected": HH + " Yes\n\nHuman: Ho\n\nAssistant: a"},
        [(HH, " Yes\n\nHuman: So?\n\nAssistant: Fine", " Yes\n\nHuman: Ho\n\nAssistant: a")],
        [(HH, " Yes\n\nHuman: So?\n\nAssistant: Fine")],
        [HH],
    ),
    Odd({"prompt": HH, "chosen": HH + " Yes", "rejected": HH + " No"}, [(HH, " Yes", " No")], [(HH, " Yes")], [HH]),
    everywhere({"prompt": "Ho", "chosen": HH + " Yes", "rejected": HH + " No"}, "that begin with the prompt"),
    Odd({"prompt": "", "chosen": HH + " Yes", "rejected": HH + " No"}, [(HH, " Yes", " No")], [(HH, " Yes")], [HH]),
    Odd({"text": HH + " Yes"}, NO_PAIR, [("", HH + " Yes")], [HH]),
    # Messages
    everywhere({"messages": []}, "found an empty list in messages"),
    everywhere({"messages": ["Hi"]}, "found str in message 0"),
    everywhere({"messages": [{"content": "Hi"}]}, "found fields ['content'] in message 0"),
    everywhere({"messages": [HI, {"role": "wizard", "content": "x"}]}, "found 'wizard' in message 1"),
    everywhere({"messages": [HI, {"role": "assistant"}]}, "found no content in message 1"),
    everywhere({"messages": [HI, {"role": "assistant", "content": 3}]}, "found int in message 1"),
    everywhere({"messages": [IMAGE, YES]}, "found type 'image_url' in message 0"),
    everywhere({"messages": [user([{"type": "thinking", "text": "x"}]), YES]}, "found type 'thinking'"),
    everywhere({"system": "y", "messages": [system("x"), HI, YES]}, "found two that differ"),
    Odd(
        {"system": "x", "messages": [system("x"), HI, YES]},
        NO_PAIR,
        [([], [system("x"), HI, YES])],
        [[system("x"), HI]],
    ),
    Odd({"messages": [HI]}, NO_PAIR, Bad("found fewer than two"), [[HI]]),
    Odd({"messages": [HI, MORE]}, NO_PAIR, Bad("expected an assistant's turn"), [[HI, MORE]]),
    Odd({"messages": [HI, assistant(" ")]}, NO_PAIR, Bad("an empty message"), [[HI]]),
    Odd({"messages": [HI, YES, MORE]}, NO_PAIR, [([], [HI, YES, MORE])], [[HI, YES, MORE]]),
    Odd(
        {
            "messages": [
                {"role": " User", "content": PARTS, "id": 3, "name": None},
                {"role": "ASSISTANT", "content": "Yes"},
            ]
        },
        NO_PAIR,
        [([], [HI, YES])],
        [[HI]],
    ),
    Odd({"messages": [HI, CALL, RESULT, FINE]}, NO_PAIR, [([], [HI, CALL, RESULT, FINE])], [[HI, CALL, RESULT]]),
    Odd({"messages": [HI, CALL]}, NO_PAIR, [([], [HI, CALL])], [[HI]]),
    everywhere({"prompt": "Ho", "messages": [HI, YES]}, "found fields ['messages', 'prompt'] that disagree"),
    # Messages in pairs
    everywhere({"chosen": [HI, YES], "rejected": [user("Ho"), NO]}, "found two prompts"),
    everywhere({"chosen": [YES], "rejected": [NO]}, "found an empty or another one"),
    everywhere({"prompt": "Ho", "chosen": [HI, YES], "rejected": [HI, NO]}, "found another text"),
    everywhere({"prompt": [user("Ho")], "chosen": [HI, YES], "rejected": [HI, NO]}, "found another user's turn"),
    Odd(
        {"prompt": "So?", "chosen": [HI, YES, MORE, FINE], "rejected": [HI, YES, MORE, BAD]},
        [([HI, YES, MORE], [FINE], [BAD])],
        [([HI, YES, MORE], [FINE])],
        [[HI, YES, MORE]],
    ),
    Odd({"prompt": [HI], "chosen": [HI, YES], "rejected": [HI, NO]}, [([HI], [YES], [NO])], [([HI], [YES])], [[HI]]),
    Odd(
        {"prompt": [system("x"), HI], "chosen": [HI, YES], "rejected": [HI, NO]},
        [([system("x"), HI], [YES], [NO])],
        [([system("x"), HI], [YES])],
        [[system("x"), HI]],
    ),
    Odd(
        {"prompt": "Hi", "chosen": [system("x"), YES], "rejected": [system("x"), NO]},
        [([system("x"), HI], [YES], [NO])],
        [([system("x"), HI], [YES])],
        [[system("x"), HI]],
    ),
    Odd(
        {"prompt": [HI, assistant("Ye")], "chosen": "s", "rejected": "p"},
        [([HI, assistant("Ye")], [assistant("s")], [assistant("p")])],
        [([HI, assistant("Ye")], [assistant("s")])],
        [[HI, assistant("Ye")]],
    ),
    Odd(
        {"prompt": [HI, YES], "chosen": [MORE, FINE], "rejected": [MORE, BAD]},
        [([HI, YES, MORE], [FINE], [BAD])],
        [([HI, YES, MORE], [FINE])],
        [[HI, YES, MORE]],
    ),
    Odd({"chosen": [HI, YES], "rejected": "No"}, [([HI], [YES], [NO])], [([HI], [YES])], [[HI]]),
    Odd(
        {"chosen": [HI, YES], "rejected": [HI, YES, MORE, FINE]},
        [([HI], [YES], [YES, MORE, FINE])],
        [([HI], [YES])],
        [[HI]],
    ),
    Odd({"chosen": [HI, YES], "rejected": [HI, YES]}, Bad("responses that differ"), [([HI], [YES])], [[HI]]),
    # Named data sets
    everywhere({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "among [0, 1] in labels"),
    everywhere({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b"}, "in labels, found None"),
    everywhere({"prompt": "Hi", "response_0": "a", "response_1": "b", "better_response_id": "x"}, "better_response_id"),
    everywhere({"prompt": "Hi", "answers": [{"answer": "a", "rank": None}]}, "a finite number in answers.0.rank"),
    everywhere({"prompt": "Hi", "answers": []}, "a list of fields in answers"),
    Odd({"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}]}, NO_PAIR, [("Hi", "a")], ["Hi"]),
    Odd(
        {"prompt": "Hi", "answers": [{"answer": a, "rank": r} for a, r in (("a", 1), ("b", 2), ("a", 3))]},
        [("Hi", "a", "b"), ("Hi", "b", "a")],
        [("Hi", "a")],
        ["Hi"],
    ),
    everywhere({"context": [HI], "response1": "a", "response2": "b", "overall_preference": 9}, "overall_preference"),
    everywhere({"context": "Hi", "response1": "a", "response2": "b", "overall_preference": 1}, "a list in context"),
    Odd(
        {"conversation_a": [HI, YES], "conversation_b": [HI, NO], "winner": "tie (bothbad)"},
        [],
        [],
        [[HI]],
    ),
    everywhere({"conversation_a": [HI, YES], "conversation_b": [HI, NO], "winner": "b"}, "found 'b'"),
    everywhere({"info": {"id": 3}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}, "info.post"),
    everywhere({"info": {"post": "x"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}, "in choice, found 2"),
    everywhere({"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]}, "no content"),
    Odd(
        {"system": "x", "conversations": [{"from": "Human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        NO_PAIR,
        [([], [system("x"), HI, YES])],
        [[system("x"), HI]],
    ),
    everywhere({"data": ["Hi", 3]}, "a list of texts in data"),
    Odd({"instruction": "Hi", "input": "", "output": "Yes"}, NO_PAIR, [("Hi", "Yes")], ["Hi"]),
    Odd({"instruction": "Hi", "output": ""}, NO_PAIR, Bad("expected a response in output"), ["Hi"]),
    everywhere({"instruction": "Hi", "input": {"a": 1}, "output": "Yes"}, "text in instruction and input"),
    everywhere({"prompt": "Ho", "conversations": [{"from": "human", "value": "Hi"}]}, "that disagree"),
    Odd({"prompt": "Hi", "response": "Yes", "score": "A"}, NO_PAIR, [("Hi", "Yes")], ["Hi"]),
    Odd({"prompt": "no", "response": "Yes", "label": False}, [], [], ["no"]),
    everywhere({"prompt": "Hi", "response": "Yes", "helpfulness": "high"}, "a finite number in helpfulness"),
    Odd({"prompt": "alone", "response": "Yes", "helpfulness": 3}, [], [("alone", "Yes")], ["alone"]),
]

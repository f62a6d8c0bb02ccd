"""Rows of data as they are found and what the readers make of them: the cases of tests/test_data_forms.py and of the
table in docs/data.md, which `python -m tests.forms` writes anew."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

PAGE = pathlib.Path(__file__).parent.parent / "docs/data.md"
START, END = "<!-- forms: written by python -m tests.forms -->", "<!-- end of forms -->"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


class Case(NamedTuple):
    """A form of data."""

    name: str
    """As the table names it."""
    rows: list[dict[str, Any]]
    """What a file holds; one row for most forms."""
    pairs: list[tuple[Any, Any, Any]] | None
    """(prompt, chosen, rejected) of `read_pairs`; None where a row is no pair."""
    examples: list[tuple[Any, Any]] | None
    """(prompt, response) of `read_examples`; None where there is nothing to learn."""
    prompts: list[Any] | None
    """`read_prompts`; None where there is no prompt."""
    options: Mapping[str, Any] = {}
    """Keywords of the readers."""
    counts: Mapping[str, int] = {}
    """`Rows.counts` of `read_pairs`."""


HI, YES, NO = user("Hi"), assistant("Yes"), assistant("No")
MORE, FINE, BAD = user("So?"), assistant("Fine"), assistant("Bad")
HH = "\n\nHuman: Hi\n\nAssistant:"

CASES = [
    Case(
        "explicit prompt, text",
        [{"prompt": "Hi", "chosen": " Yes", "rejected": " No"}],
        [("Hi", " Yes", " No")],
        [("Hi", " Yes")],
        ["Hi"],
    ),
    Case(
        "hh-rlhf: transcripts",
        [{"chosen": HH + " Yes", "rejected": HH + " No"}],
        [(HH, " Yes", " No")],
        [(HH, " Yes")],
        [HH],
    ),
    Case(
        "hh-rlhf, parting before the last turn",
        [
            {
                "chosen": HH + " Yes\n\nHuman: So?\n\nAssistant: Fine",
                "rejected": HH + " No\n\nHuman: So?\n\nAssistant: Bad",
            }
        ],
        [(HH, " Yes\n\nHuman: So?\n\nAssistant: Fine", " No\n\nHuman: So?\n\nAssistant: Bad")],
        [(HH, " Yes\n\nHuman: So?\n\nAssistant: Fine")],
        [HH],
    ),
    Case(
        "hh-rlhf, with as_messages",
        [{"chosen": HH + " Yes", "rejected": HH + " No"}],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
        {"as_messages": True},
    ),
    Case(
        "implicit prompt, messages",
        [{"chosen": [HI, YES], "rejected": [HI, NO]}],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "messages, parting before the last turn",
        [{"chosen": [HI, YES, MORE, FINE], "rejected": [HI, NO, MORE, BAD]}],
        [([HI], [YES, MORE, FINE], [NO, MORE, BAD])],
        [([HI], [YES, MORE, FINE])],
        [[HI]],
    ),
    Case(
        "explicit prompt, messages",
        [{"prompt": [HI], "chosen": [YES], "rejected": [NO]}],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "prompt of messages, responses as text",
        [{"prompt": [HI], "chosen": "Yes", "rejected": "No"}],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "UltraFeedback (binarized)",
        [{"prompt": "Hi", "chosen": [HI, YES], "rejected": [HI, NO], "score_chosen": 8.5, "score_rejected": 6}],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "text prompt beside the assistant's turns",
        [{"prompt": "Hi", "chosen": [YES], "rejected": [NO]}],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "UltraFeedback (as first published)",
        [
            {
                "instruction": "Hi",
                "completions": [
                    {"response": "No", "overall_score": 2},
                    {"response": "Yes", "overall_score": 7.5},
                ],
            }
        ],
        [("Hi", "Yes", "No")],
        [("Hi", "Yes")],
        ["Hi"],
    ),
    Case(
        "Orca pairs: system, question",
        [{"system": "Be kind.", "question": "Hi", "chosen": "Yes", "rejected": "No"}],
        [([system("Be kind."), HI], [YES], [NO])],
        [([system("Be kind."), HI], [YES])],
        [[system("Be kind."), HI]],
    ),
    Case(
        "SHP",
        [{"history": "Hi", "human_ref_A": "No", "human_ref_B": "Yes", "labels": 0}],
        [("Hi", "Yes", "No")],
        [("Hi", "Yes")],
        ["Hi"],
    ),
    Case(
        "PKU-SafeRLHF",
        [{"prompt": "Hi", "response_0": "No", "response_1": "Yes", "better_response_id": 1, "safer_response_id": 0}],
        [("Hi", "Yes", "No")],
        [("Hi", "Yes")],
        ["Hi"],
    ),
    Case(
        "PKU-SafeRLHF, with safer",
        [{"prompt": "Hi", "response_0": "No", "response_1": "Yes", "better_response_id": 1, "safer_response_id": 0}],
        [("Hi", "No", "Yes")],
        [("Hi", "No")],
        ["Hi"],
        {"safer": True},
    ),
    Case(
        "Nectar: ranked list",
        [
            {
                "prompt": HH + " ",
                "answers": [
                    {"answer": "Maybe", "rank": 2},
                    {"answer": "Yes", "rank": 1},
                    {"answer": "No", "rank": 3},
                ],
            }
        ],
        [(HH + " ", "Yes", "Maybe"), (HH + " ", "Yes", "No"), (HH + " ", "Maybe", "No")],
        [(HH + " ", "Yes")],
        [HH + " "],
    ),
    Case(
        "Nectar, with compare best",
        [
            {
                "prompt": HH + " ",
                "answers": [
                    {"answer": "Maybe", "rank": 2},
                    {"answer": "Yes", "rank": 1},
                    {"answer": "No", "rank": 3},
                ],
            }
        ],
        [(HH + " ", "Yes", "Maybe"), (HH + " ", "Yes", "No")],
        [(HH + " ", "Yes")],
        [HH + " "],
        {"compare": "best"},
    ),
    Case(
        "HelpSteer2: scores of rows with one prompt",
        [
            {"prompt": "Hi", "response": "No", "helpfulness": 1},
            {"prompt": "Hi", "response": "Yes", "helpfulness": 4},
            {"prompt": "Hi", "response": "Maybe", "helpfulness": 1},
        ],
        [("Hi", "Yes", "No"), ("Hi", "Yes", "Maybe")],
        [("Hi", "No"), ("Hi", "Yes"), ("Hi", "Maybe")],
        ["Hi", "Hi", "Hi"],
        {},
        {"tie": 1},
    ),
    Case(
        "HelpSteer3",
        [{"context": [HI], "response1": "Yes", "response2": "No", "overall_preference": -2}],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "HelpSteer2, its preferences",
        [{"prompt": "Hi", "response_1": "No", "response_2": "Yes", "preference_strength": 3}],
        [("Hi", "Yes", "No")],
        [("Hi", "Yes")],
        ["Hi"],
    ),
    Case(
        "labels that are true or false",
        [{"prompt": "Hi", "completion": "No", "label": False}, {"prompt": "Hi", "completion": "Yes", "label": True}],
        [("Hi", "Yes", "No")],
        [("Hi", "Yes")],
        ["Hi", "Hi"],
    ),
    Case(
        "Chatbot Arena",
        [{"conversation_a": [HI, NO], "conversation_b": [HI, YES], "winner": "model_b"}],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "summarize from feedback",
        [
            {
                "info": {"post": "Hello all.", "title": "Hello", "subreddit": "hi"},
                "summaries": [{"text": " No"}, {"text": " Yes"}],
                "choice": 1,
            }
        ],
        [("SUBREDDIT: r/hi\n\nTITLE: Hello\n\nPOST: Hello all.\n\nTL;DR:", " Yes", " No")],
        [("SUBREDDIT: r/hi\n\nTITLE: Hello\n\nPOST: Hello all.\n\nTL;DR:", " Yes")],
        ["SUBREDDIT: r/hi\n\nTITLE: Hello\n\nPOST: Hello all.\n\nTL;DR:"],
    ),
    Case(
        "ShareGPT",
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}],
        None,
        [([], [HI, YES])],
        [[HI]],
    ),
    Case(
        "ShareGPT with a pair",
        [
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Yes"},
                "rejected": {"from": "gpt", "value": "No"},
            }
        ],
        [([HI], [YES], [NO])],
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "messages",
        [{"messages": [HI, YES, MORE, FINE]}],
        None,
        [([], [HI, YES, MORE, FINE])],
        [[HI, YES, MORE]],
    ),
    Case(
        "UltraChat (200k): messages and their first prompt",
        [{"prompt": "Hi", "messages": [HI, YES, MORE, FINE]}],
        None,
        [([], [HI, YES, MORE, FINE])],
        [[HI]],
    ),
    Case("WildChat, LMSYS-Chat: conversation", [{"conversation": [HI, YES]}], None, [([], [HI, YES])], [[HI]]),
    Case("UltraChat: data", [{"data": ["Hi", "Yes"]}], None, [([], [HI, YES])], [[HI]]),
    Case("prompt and response", [{"prompt": "Hi", "response": " Yes"}], None, [("Hi", " Yes")], ["Hi"]),
    Case(
        "prompt and completion, messages",
        [{"prompt": [HI], "completion": [YES]}],
        None,
        [([HI], [YES])],
        [[HI]],
    ),
    Case(
        "Alpaca",
        [{"instruction": "Add them.", "input": "1 and 2", "output": "3"}],
        None,
        [("Add them.\n\n1 and 2", "3")],
        ["Add them.\n\n1 and 2"],
    ),
    Case(
        "AlpacaEval",
        [{"instruction": "Hi", "output": "Yes", "generator": "someone", "dataset": "koala"}],
        None,
        [("Hi", "Yes")],
        ["Hi"],
    ),
    Case("question and answer", [{"question": "Hi", "answer": "Yes"}], None, [("Hi", "Yes")], ["Hi"]),
    Case("text", [{"text": "Hi there"}], None, [("", "Hi there")], None),
    Case("prompt", [{"prompt": "Hi"}], None, None, ["Hi"]),
    Case(
        "columns prompt=q, chosen=pair.0.text, rejected=pair.1.text",
        [{"q": "Hi", "pair": [{"text": "Yes"}, {"text": "No"}], "chosen": "?"}],
        [("Hi", "Yes", "No")],
        [("Hi", "Yes")],
        ["Hi"],
        {"columns": {"prompt": "q", "chosen": "pair.0.text", "rejected": "pair.1.text"}},
    ),
    Case(
        "columns prompt=q, response=a",
        [{"q": "Hi", "a": "Yes", "chosen": "?", "rejected": "?"}],
        None,
        [("Hi", "Yes")],
        ["Hi"],
        {"columns": {"prompt": "q", "response": "a"}},
    ),
]


def brief(text: Any) -> str:
    """A text as JSON; messages as "role: content", with a dot between them."""
    if isinstance(text, str):
        return json.dumps(text, ensure_ascii=False)
    return " · ".join(f"{message['role']}: {message['content']}" for message in text)


def code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def table() -> str:
    """The table of forms as Markdown."""
    lines = ["| form | row | pairs: prompt → chosen, not rejected | text to learn | prompt |", "|---|---|---|---|---|"]
    for case in CASES:
        rows = "<br>".join(code(json.dumps(row, ensure_ascii=False)) for row in case.rows)
        pairs = [f"{code(brief(p))} → {code(brief(c))}, not {code(brief(r))}" for p, c, r in case.pairs or ()]
        texts = [f"{code(brief(p))} → {code(brief(r))}" if p else code(brief(r)) for p, r in case.examples or ()]
        prompts = list(dict.fromkeys(code(brief(prompt)) for prompt in case.prompts or ()))
        cells = [case.name, rows, *("<br>".join(found) or "–" for found in (pairs, texts, prompts))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(START, 1)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote {PAGE}")

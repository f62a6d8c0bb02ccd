"""The table of docs/tokens.md: what becomes of a chat under each template. `python -m tests.write_templates` writes it
anew."""

from __future__ import annotations

import pathlib

from jaxalign import tokens
from tests import token_cases as cases

PAGE = pathlib.Path(__file__).parent.parent / "docs/tokens.md"
START, END = "<!-- written by python -m tests.write_templates -->", "<!-- end of the table -->"
CHAT = [{"role": "user", "content": "How are you?"}]
NAMES = {
    "CHATML": "ChatML (Qwen, SmolLM)",
    "LLAMA2": "Llama-2, Mistral",
    "ZEPHYR": "Zephyr, Tulu",
    "THINK": "opens `<think>` for generation",
    "NO_SYSTEM": "refuses a system turn",
    "BARE": "roles in plain text",
}


def code(tokenizer, ids) -> str:
    text = tokenizer.decode(ids).replace("\n", "\\n").replace("|", "\\|")
    return f"`{text}`" if text else "–"


def table() -> str:
    lines = ["| template | given | learned | its end, learned | read by a reward model alone | counted as |"]
    lines.append("|---|---|---|---|---|---|")
    for name, title in NAMES.items():
        make = cases.dummy_space if name == "LLAMA2" else cases.byte_level
        tokenizer = make(getattr(cases, name))
        row = tokens.encode_pair(tokens.text_format(tokenizer), CHAT, "I am fine.")
        parts = [code(tokenizer, ids) for ids in (row.prompt, row.response, row.closing, row.tail)]
        lines.append(f"| {title} | {' | '.join(parts)} | {', '.join(row.notes) or '–'} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(START, 1)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote {PAGE}")

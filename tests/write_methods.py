"""Writes docs/methods.md from examples/gallery: a table of the methods, and the lines of each.

python -m tests.write_methods
"""

from __future__ import annotations

import ast
import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "examples/gallery").glob("*.py"))
PAGE = ROOT / "docs/methods.md"
FIELDS = ("Source", "Equation", "When", "Cost")
HEAD = """\
# Methods in ten lines

Known methods as compositions of the library's parts, written by `python -m tests.write_methods` from the files of
`examples/gallery/`. Each file has the method as a function of Policies, Critics and Rewards, and `build`, which binds
models to it for `python -m eval.decode`; a test holds each against its exact law on an enumerated process. From the
folder of the files:

```bash
python -m eval.decode --model MODEL --prompts prompts.txt --out runs/gallery \\
    --method proxy_tuning:build@0.5,1,2 --with-model expert=EXPERT --with-model amateur=AMATEUR
```

b is the base's next-token law, E an expert's, A an amateur's; cost is in passes per token or per response.
"""


class Entry(NamedTuple):
    """What a file of the gallery says of its method."""

    title: str
    """Its name and what it does, one sentence."""
    fields: dict[str, str]
    """Source, equation, use and cost."""
    body: str
    """The source of `method`."""
    models: list[str]
    """The names of --with-model that `build` reads."""


def entry(path: pathlib.Path) -> Entry:
    """Reads a file of the gallery without running it."""
    text = path.read_text()
    parsed = ast.parse(text)
    title, _, rest = (ast.get_docstring(parsed) or "").partition("\n\n")
    fields = dict(line.split(": ", 1) for line in rest.splitlines())
    (method,) = [node for node in parsed.body if isinstance(node, ast.FunctionDef) and node.name == "method"]
    calls = [node for node in ast.walk(parsed) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "model"]
    names = [call.args[0].value for call in named if isinstance(call.args[0], ast.Constant)]
    return Entry(title, fields, ast.get_source_segment(text, method) or "", sorted(map(str, names)))


def linked(source: str) -> str:
    """Numbers of arXiv as links."""
    words = []
    for word in source.replace("arXiv ", "").split(" "):
        number = word.strip(",")
        is_paper = number.replace(".", "").isdigit() and len(number) == 10
        words.append(word.replace(number, f"[{number}](https://arxiv.org/abs/{number})") if is_paper else word)
    return " ".join(words)


def written() -> str:
    """The page as it is now."""
    entries = {path.stem: entry(path) for path in FILES}
    lines = [HEAD, "| method | equation | source | when to use | cost |", "|---|---|---|---|---|"]
    for name, one in entries.items():
        cells = [f"[{name}](#{name.replace('_', '-')})", one.fields["Equation"], linked(one.fields["Source"])]
        cells = [cell.replace("|", "\\|") for cell in [*cells, one.fields["When"], one.fields["Cost"]]]
        lines.append(f"| {' | '.join(cells)} |")
    for name, one in entries.items():
        models = f" Models: {', '.join(one.models)}." if one.models else ""
        lines += [f"\n## {name.replace('_', '-')}\n", f"{one.title}{models}\n", f"```text\n{one.body}\n```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(written())
    print(f"wrote {PAGE}")

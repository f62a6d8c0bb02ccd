"""What SECURITY.md says of files of others: templates are sandboxed and end, pages escape all texts."""

from __future__ import annotations

import html.parser
import json
import pathlib
import time

import pytest

from jaxalign import models
from jaxalign.data import encoded, rows
from jaxalign.evaluation.report import write_report
from jaxalign.tokens import _chat, text_format
from tests import folders_made
from tests.folders_made import write
from tests.test_report import make_run

SCRIPT = "<script>alert('xss')</script>"
ATTACKS = {
    "an endless loop": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "an attribute of Python's": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a global of a function": "{{ raise_exception.__globals__.keys() }}",
    "a file": "{% include '/etc/passwd' %}",
    "a change of what it is given": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "a recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a large range": "{% for i in range(10 ** 9) %}{% endfor %}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_is_sandboxed_and_ends(attack, tmp_path, monkeypatch):
    monkeypatch.setattr(_chat, "TEMPLATE_SECONDS", 0.5)
    write(tmp_path, {"tokenizer.json": folders_made.tokenizer_json(), "chat_template.jinja": ATTACKS[attack]})
    given = [rows.PromptText("prompts.jsonl:1", [{"role": "user", "content": "Hi"}])]
    begun = time.perf_counter()
    form = text_format(models.tokenizer(tmp_path))
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: expected .*chat template") as found:
        encoded.encode_prompts(given, form, max_length=None, on_long="error", skip_bad=False)
    assert time.perf_counter() - begun < 20
    assert "root:" not in str(found.value)


class Elements(html.parser.HTMLParser):
    """The elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, sorted(name for name, _ in attrs)))


def elements(folder: pathlib.Path, page: pathlib.Path) -> list[tuple[str, list[str]]]:
    write_report([folder], page)
    parser = Elements()
    parser.feed(page.read_text())
    return parser.found


def spoilt(value, mark: str):
    """Every text and every name of a JSON value with a mark; the names that the report reads stay."""
    if isinstance(value, dict):
        return {name: spoilt(each, mark) for name, each in value.items()} | {f"x{mark}": 1.0}
    if isinstance(value, list):
        return [spoilt(each, mark) for each in value]
    return f"{value}{mark}" if isinstance(value, str) else value


@pytest.mark.parametrize(
    "attack", [SCRIPT, '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</style><!--"]
)
def test_no_text_of_a_run_folder_becomes_markup(attack, tmp_path):
    """The page has the elements that it has with harmless letters in the same places, whatever a text holds."""

    def page(mark: str, name: str):
        folder = make_run(tmp_path / name)
        for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            values = [spoilt(json.loads(line), mark) for line in lines]
            path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return elements(folder, tmp_path / f"{name}.html")

    clean = page("harmless", "run")
    (tmp_path / "run").rename(tmp_path / "other")
    assert page(attack, "run") == clean

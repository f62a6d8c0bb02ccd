"""Gross misuses are errors to a type checker: mypy reports each marked line of tests/typing/misuse.py and no other."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
FILE = "tests/typing/misuse.py"


def test_mypy_reports_every_misuse_and_nothing_else():
    lines = (ROOT / FILE).read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if re.search(r"# error: \S", line)}
    assert len(marked) >= 9
    command = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", "--no-error-summary", FILE]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    reported = {int(n) for n in re.findall(rf"^{re.escape(FILE)}:(\d+):(?:\d+:)? error", found.stdout, re.MULTILINE)}
    assert reported == marked, found.stdout + found.stderr


def test_no_function_is_typed_by_its_result_alone():
    """A Protocol says what a function takes; `Callable[..., X]` lets anything through."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for room in ("jaxalign", "train", "eval")
        for path in (ROOT / room).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"Callable\[\s*\.\.\.", line)
    ]
    assert found == []

"""README, CONTRIBUTING and PAPERS say what is so: their programs run, their commands exist, their test ids collect."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxalign import decoding, policies, tree
from tests.conftest import EOS, VOCAB, tiny_lm

ROOT = pathlib.Path(__file__).parent.parent


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_worked_example_of_the_readme_prints_what_it_says(capsys):
    program = blocks("README.md", "python")[0]
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# (\(.*)$", program, re.MULTILINE)


def test_the_composition_of_the_readme_runs(capsys):
    exec(compile(blocks("README.md", "python")[1], "README.md", "exec"), {})
    assert "(2, 16)" in capsys.readouterr().out


def test_the_extensions_of_contributing_work():
    names: dict = {}
    for program in blocks("CONTRIBUTING.md", "python"):
        assert len(program.splitlines()) < 20
        exec(compile(program, "CONTRIBUTING.md", "exec"), names)
    lm, params = tiny_lm(0)
    policy = policies.tilt(policies.language_model(lm), names["brevity"](0, VOCAB))
    prompts = tree.prompts(3)
    arguments = {"policy": params, "critic": None, "beta": jnp.asarray(0.05)}
    drawn = decoding.sample(policy, arguments, jax.random.key(0), prompts, max_new_tokens=4, eos_ids=EOS)
    assert drawn.finished.all()
    left, right = names["in_two_halves"](policy, arguments, jax.random.key(0), prompts, 2, EOS)
    assert left.tokens.shape == right.tokens.shape == (3, 2)
    reward = names["longest_first"](jnp.asarray(1.0), *decoding.join(prompts, drawn), jnp.arange(3))
    assert reward.shape == (3,)


def test_commands_of_the_readme_name_modules_that_exist():
    for text in [block for name in ("README.md", "CONTRIBUTING.md") for block in blocks(name, "bash")]:
        for module in re.findall(r"python -m ((?:eval|train)[\w.]*)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_test_id_of_papers_is_collected():
    rows = re.findall(r"`(tests/[\w/]+\.py::\w+)`", (ROOT / "PAPERS.md").read_text())
    assert len(rows) > 40
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            *sorted({r.split("::")[0] for r in rows}),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    collected = set(re.findall(r"^(tests/[\w/]+\.py::\w+)", found.stdout, re.MULTILINE))
    missing = [row for row in rows if row not in collected]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "PAPERS.md"])
def test_paths_in_backticks_exist(name):
    for path in re.findall(r"`((?:jaxalign|train|eval|tests|docs|\.ci)/[\w./]*)`", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "PAPERS.md"])
def test_links_to_files_resolve(name):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target

"""What `import jaxalign` and its submodules load, in a fresh process, and what the face offers."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import jaxalign

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = ["tyro", "tqdm", "matplotlib", "transformers", "orbax", "grain", "torch"]
PROGRAM = f"""
import importlib, json, pathlib, sys
import jaxalign
found = {{"jaxalign": ["jax"] * ("jax" in sys.modules)}}
root = pathlib.Path(jaxalign.__path__[0])
files = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
names = sorted({{".".join(f.parent.parts if f.name == "__init__" else f.parts) for f in files}} - {{"jaxalign"}})
seen = set()
for name in names:
    importlib.import_module(name)
    new = {{m for m in {HEAVY} if m in sys.modules}} - seen
    seen |= new
    if new:
        found[name] = sorted(new)
print(json.dumps([names, found]))
"""


def run(program: str) -> str:
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_no_module_loads_what_only_one_of_its_functions_needs():
    """Modules are imported one after the other; each is charged with what was not loaded before it."""
    names, loaded = json.loads(run(PROGRAM).splitlines()[-1])
    assert {"jaxalign.training", "jaxalign.evaluation", "jaxalign.models.hf"} <= set(names)
    assert loaded.pop("jaxalign") == []  # the face alone does not even load jax
    assert loaded == {}


def test_a_submodule_is_there_after_import_jaxalign_alone():
    assert run("import jaxalign\nprint(jaxalign.gibbs.log_policy.__name__)").strip() == "log_policy"


def test_every_name_of_the_face_is_there():
    for name in jaxalign.__all__:
        assert getattr(jaxalign, name) is not None
    assert set(jaxalign.__all__) <= set(dir(jaxalign))
    assert 35 <= len(jaxalign.__all__) <= 50
    assert jaxalign.TokenBatch is jaxalign.types.TokenBatch
    assert jaxalign.sample is jaxalign.decoding.sample


def test_type_checkers_see_the_names_of_the_face():
    tree = ast.parse((ROOT / "jaxalign/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    shown = {alias.asname or alias.name for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert shown | {"__version__"} == set(jaxalign.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        _ = jaxalign.smaple


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "jaxalign._version.__version__"}
    text = (ROOT / "jaxalign/_version.py").read_text()
    assert f'__version__ = "{jaxalign.__version__}"' in text
    first = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {jaxalign.__version__}\n" in citation
    assert set(re.findall(r"arxiv.org/abs/([\d.]+)", citation)) <= set(
        re.findall(r"arxiv.org/abs/([\d.]+)", (ROOT / "PAPERS.md").read_text())
    )
    assert first.startswith("[Unreleased]") or first.startswith(f"[{jaxalign.__version__}]")


def test_a_tokenizer_is_made_and_read_without_a_word(tmp_path):
    """transformers advises to install torch, which nothing here needs; what else it says is shown."""
    folder = str(tmp_path / "words")
    program = (
        "from jaxalign import models\nfrom jaxalign.data import tokenizers\n"
        f"tokenizers.word_level(['a']).save_pretrained({folder!r})\nmodels.tokenizer({folder!r})\n"
        "import logging\nlogging.getLogger('transformers').warning('PyTorch was not found, said again')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout + found.stderr.replace("[transformers] ", "") == "PyTorch was not found, said again\n"

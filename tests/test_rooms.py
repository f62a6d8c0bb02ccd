"""The rooms of the repository: imports point one way, without circles, and no name hides a module."""

from __future__ import annotations

import ast
import graphlib
import pathlib
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the ground up: a room imports from its own line and from the lines above it. CONTRIBUTING.md draws the same.
ORDER = [
    "types results shapes _arrays _devices _hosts _version",
    "_words _time_limits _checks _parts _programs _transformers _blocks _tables _builders _modules _files _options _io "
    "_locks _leftovers _runs _signals _ties _progress prompts mdp gibbs pools losses advantages metrics "
    "tokens",
    "tree shaping infalign",
    "models",
    "rewards",
    "rollout policies",
    "critics",
    "decoding",
    "data worlds bilevel",
    "text training testing",
    "evaluation",
    "commands launch __main__",
    "train eval",
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
PAGE_LINES, TOPIC_LINES = 120, 400


def modules(root: pathlib.Path = ROOT) -> dict[str, pathlib.Path]:
    """Module name -> file, of jaxalign, train and eval."""
    found = {}
    for top in ("jaxalign", "train", "eval"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: Iterable[str], package: str = "") -> set[str]:
    """The modules among `known` that a file of `package` imports, anywhere in it: a late import is an import."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full in known else module)
    return found & set(known)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "jaxalign" and len(parts) > 1 else parts[0]


def edges() -> set[tuple[str, str]]:
    """(module, imported module). The face, jaxalign/__init__.py, names everything and is left out."""
    files = modules()
    package = {name: name if path.stem == "__init__" else name.rpartition(".")[0] for name, path in files.items()}
    found = {(name, other) for name, path in files.items() for other in imports(path.read_text(), files, package[name])}
    return {(a, b) for a, b in found if a != b and "jaxalign" not in (a, b)}


def circle(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A circle in the graph, or an empty list."""
    graph: dict[str, set[str]] = {}
    for a, b in pairs:
        if a != b:
            graph.setdefault(a, set()).add(b)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_its_place_in_the_order():
    assert {room(name) for name in modules()} - {"jaxalign"} <= set(LEVEL)


def test_no_import_points_upwards():
    assert {(a, b) for a, b in edges() if LEVEL[room(b)] > LEVEL[room(a)]} == set()


def test_train_and_eval_do_not_import_each_other():
    assert not {(a, b) for a, b in edges() if {room(a), room(b)} == {"train", "eval"}}


def test_no_circle_of_files():
    assert circle(edges()) == []


def test_no_circle_of_packages():
    """A package and one inside it are two. An __init__ re-exports what lies below: its own imports do not count."""
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    owner = {name: name if name in packages else name.rpartition(".")[0] or name for name in modules()}
    between = {(owner[a], owner[b]) for a, b in edges() if a not in packages}
    rooms = {(room(a), room(b)) for a, b in edges()}
    assert circle((a, b) for a, b in between if a != "jaxalign" and b != "jaxalign") == []
    assert circle(rooms) == []


@pytest.mark.parametrize("package", [name for name, path in modules().items() if path.name == "__init__.py"])
def test_no_name_of_a_package_hides_a_module(package):
    """`from jaxalign.policies import tilt` may not make `jaxalign.policies.tilt`, a module, out of reach."""
    below = {name.removeprefix(package + ".") for name in modules() if name.startswith(package + ".")}
    bound = set()
    for node in ast.parse(modules()[package].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.module != package:
            bound |= {alias.asname or alias.name for alias in node.names}
    assert not bound & below


def too_long(files: Iterable[pathlib.Path], limit: int) -> dict[str, int]:
    """Path from the repository's root -> lines, of the files that have more than `limit`."""
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    return {path: count for path, count in lines.items() if count > limit}


def test_launch_scripts_are_pages_and_files_of_training_keep_to_a_topic():
    pages = [path for top in ("train", "eval") for path in (ROOT / top).glob("*.py")]
    assert len(pages) > 10
    assert not too_long(pages, PAGE_LINES)
    assert not too_long((ROOT / "jaxalign/training").glob("*.py"), TOPIC_LINES)


def test_contributing_draws_this_order():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = text.split("<!-- the order of rooms -->")[1].split("```")[1].splitlines()[1:]
    assert [set(line.split("#")[0].split()) for line in drawn] == [set(line.split()) for line in ORDER]


def test_the_readers_see_what_they_should():
    known = {"jaxalign.models", "jaxalign.models.lora", "train.rl"}
    late = "def f():\n    from jaxalign.models import lora, Config\n    import train.rl"
    assert imports("from . import rl\nfrom ..jaxalign import models", known, "train") == {"train.rl", "jaxalign.models"}
    assert imports(late, known) == {"jaxalign.models.lora", "jaxalign.models", "train.rl"}
    assert circle([("a", "b"), ("b", "c"), ("c", "a")])
    assert not circle([("a", "b"), ("b", "c"), ("a", "c")])

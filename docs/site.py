"""What the site shows beside the files of docs/: the repository's own pages, the example programs, and a reference page
for each room of the library. mkdocs calls the functions `on_…` while it builds (`mkdocs.yml`)."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = {  # a file of the repository, and its place in the site
    "README.md": "project/readme.md",
    "PAPERS.md": "project/papers.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "eval/bench/NOTES.md": "project/speed.md",
}
SHOWN_AS_CODE = {".slurm": "bash", ".sh": "bash", ".toml": "toml", ".cff": "yaml", ".py": "python"}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def rooms() -> list[str]:
    """The packages and modules with a reference page: those of docs/api.md's listing."""
    return re.findall(r"^### jaxalign\.(\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)


def reference_page(room: str) -> str:
    """What a room says of itself, then each name of its `__all__`: functions first, types and constants after them."""
    module = importlib.import_module(f"jaxalign.{room}")

    def own(name: str) -> bool:  # jax.Array and the like, and a room inside this one, have their own pages
        if f"{room}.{name}" in rooms():
            return False
        return getattr(getattr(module, name), "__module__", "jaxalign").startswith(("jaxalign", "jaxtyping", "typing"))

    names = sorted(filter(own, module.__all__), key=lambda name: (not name[0].islower(), name))
    return f"# {room}\n\n{inspect.getdoc(module)}\n\n" + "".join(f"::: jaxalign.{room}.{name}\n\n" for name in names)


def examples_page() -> str:
    """Every program of examples/, under the first line of what it says of itself."""
    parts = [
        "# Examples\n\nEach is a whole program that a test runs; copy one and start from it. They are in the folder "
        "`examples/` of the repository.\n"
    ]
    for path in sorted((ROOT / "examples").rglob("*.py")):
        if path.name == "__init__.py" or path.parent.name == "tutorials":
            continue
        source = path.read_text()
        says = ast.get_docstring(ast.parse(source)) or ""
        program = source.split('"""', 2)[2].strip() if says else source.strip()
        name = path.relative_to(ROOT / "examples").with_suffix("").as_posix()
        parts.append(f"\n## {name.replace('_', ' ').replace('/', ': ')}\n\n{says}\n\n```python\n{program}\n```\n")
    return "".join(parts)


def tutorials() -> dict[str, str]:
    """Programs in cells, each with a page of its own: place in the site -> file."""
    found = sorted((ROOT / "examples/tutorials").glob("*.py"))
    return {f"tutorials/{path.stem}.md": path.relative_to(ROOT).as_posix() for path in found}


def tutorial_page(path: str) -> str:
    """A program in cells, its text as text and its code as code."""
    parts = []
    for cell in (ROOT / path).read_text().split("# %%")[1:]:
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + f"\n\nThe whole program is `{path}` in the repository.\n"


def code_page(path: str) -> str:
    """A script or settings file that a page links to, as a page."""
    file = ROOT / path
    language = SHOWN_AS_CODE.get(file.suffix, "text")
    return f"# {file.name}\n\n`{path}` in the repository:\n\n```{language}\n{file.read_text()}```\n"


def linked_code() -> list[str]:
    """The scripts and settings files that pages link to."""
    found = set()
    for source in [*(ROOT / "docs").rglob("*.md"), *(ROOT / path for path in TEXTS)]:
        for target, _ in LINK.findall(source.read_text()):
            path = (source.parent / target).resolve()
            if path.is_file() and path.suffix in SHOWN_AS_CODE and path.is_relative_to(ROOT):
                found.add(path.relative_to(ROOT).as_posix())
    return sorted(found)


def places() -> dict[str, str]:
    """Where the site shows a file or folder of the repository."""
    return {
        **TEXTS,
        "examples": "project/examples.md",
        **{path: f"project/{path.replace('/', '-')}.md" for path in linked_code()},
        **{path: place for place, path in tutorials().items()},
    }


def on_config(config: Any) -> Any:
    """Adds the reference pages to the navigation."""
    reference = next(part["Reference"] for part in config.nav if "Reference" in part)
    reference.extend(f"reference/{room}.md" for room in rooms())
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages that are made from other files of the repository."""
    pages = {place: (ROOT / source).read_text() for source, place in TEXTS.items()}
    pages["project/examples.md"] = examples_page()
    pages.update({places()[path]: code_page(path) for path in linked_code() if path not in tutorials().values()})
    pages.update({place: tutorial_page(path) for place, path in tutorials().items()})
    pages.update({f"reference/{room}.md": reference_page(room) for room in rooms()})
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    for file in [file for file in files if file.src_uri.endswith(tuple(SHOWN_AS_CODE))]:
        files.remove(file)  # it has a page
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links to their pages."""
    here = page.file.src_uri
    sources = {place: source for source, place in places().items()}
    source = sources.get(here, f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = places().get(path.rstrip("/")) or path.removeprefix("docs/")
        return posixpath.relpath(place, posixpath.dirname(here) or ".") + anchor

    return markdown if here.startswith("reference/") else LINK.sub(moved, markdown)

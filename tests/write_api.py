"""Writes the listings of docs/api.md anew, from the packages' `__all__`, signatures and docstrings:

python -m tests.write_api
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re

LISTED = (
    "shapes types policies critics critics.reads rewards decoding models data shaping bilevel infalign tree training "
    "evaluation tokens text testing prompts mdp gibbs pools losses advantages metrics rollout "
    "worlds.opinions worlds.summaries worlds.files worlds.sentiment worlds.smollm2"
)
HEADING = "## Every public name\n"
SHAPES = """\
Array types are named by what they hold, and the first section gives their shapes: B prompts, P prompt tokens, T new
tokens, L tokens of any text, N texts, n samples of a prompt, V vocabulary, K candidates, D hidden size, S states and M
responses of a small process; `...` stands for any axes.
"""
PAGE = pathlib.Path(__file__).parent.parent / "docs/api.md"


def entry(name: str, found: object) -> str:
    """The lines of one name: its parameters, and the first paragraph of its docstring where it has one of its own."""
    found = inspect.unwrap(found) if callable(found) else found  # of jit and of a cache of builders
    if hasattr(found, "dim_str"):
        kind, axes = found.__name__.split("[")[0], found.dim_str.replace(" ", ",")
        return f"{name}: {kind} [{axes}]"  # a named shape
    if not (inspect.isfunction(found) or inspect.isclass(found)) or not found.__module__.startswith("jaxalign"):
        return name  # a type alias or a constant
    own = found.__doc__ if inspect.isfunction(found) else vars(found).get("__doc__")
    text = " ".join((own or "").strip().split("\n\n")[0].split())
    generated = text.startswith(f"{name}(")  # what a NamedTuple or dataclass without a docstring is given
    return name + signature(found) + (f"\n    {text}" if text and not generated else "")


def signature(found: object) -> str:
    """The parameters as a reader writes them: annotations without quotes. A Protocol is listed as it is called."""
    if getattr(found, "_is_protocol", False):
        if "__call__" not in vars(found):
            return ""
        found = vars(found)["__call__"]
    if inspect.isclass(found) and issubclass(found, BaseException):
        return ""
    text = re.sub(r"\((self|_cls), ", "(", str(inspect.signature(found)))  # type: ignore[arg-type]
    text = re.sub(r", parent: .*?, name: Optional\[str\] = None", "", text)  # of a flax module
    text = re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1", text)
    text = (
        text.replace(", /)", ")").replace("(/, ", "(").replace(", /, ", ", ")
    )  # by position, as the one argument of a map is given
    text = re.sub(r"ForwardRef\('([^']*)'\)", r"\1", text)
    text = re.sub(r"(?<=: )('|\")(.*?)\1(?=[,) ])", r"\2", text)
    text = re.sub(r"(?<=-> )'([^']*)'", r"\1", text)
    text = re.sub(r"<function ([\w.<>]+) at 0x[0-9a-f]+>", r"\1", text)
    text = re.sub(r"<([\w.]+) object at 0x[0-9a-f]+>", r"\1", text)
    return text.removesuffix(" -> None")


def listing(package: str) -> str:
    module = importlib.import_module(f"jaxalign.{package}")
    return "\n".join(entry(name, getattr(module, name)) for name in module.__all__)


def written(page: str) -> str:
    """The page with its listings as they are now: a section for each of LISTED, after a word on their shapes."""
    head = page.split(HEADING)[0]
    sections = "".join(f"\n### jaxalign.{package}\n\n```text\n{listing(package)}\n```\n" for package in LISTED.split())
    return f"{head}{HEADING}\n{SHAPES}{sections}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote {PAGE}")

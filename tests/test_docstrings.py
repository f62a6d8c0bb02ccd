"""The form of docstrings: what a public function takes, gives and raises stands under Args, Returns and Raises."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.write_api import LISTED

SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)


def public(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, function) of what a module of jaxalign offers: the functions of `__all__`, and the methods of its classes
    that are not Protocols."""
    module = importlib.import_module(f"jaxalign.{name}")
    for label in module.__all__:
        found = inspect.unwrap(getattr(module, label))
        if inspect.isfunction(found):
            yield f"{name}.{label}", found
        elif inspect.isclass(found) and found.__module__.startswith("jaxalign") and not is_protocol(found):
            for method, body in vars(found).items():
                if inspect.isfunction(body) and not method.startswith("_") and body.__module__ == found.__module__:
                    yield f"{name}.{label}.{method}", body


def classes(name: str) -> Iterator[tuple[str, type]]:
    """(name, class) of what a module offers, but Protocols and exceptions."""
    module = importlib.import_module(f"jaxalign.{name}")
    for label in module.__all__:
        found = getattr(module, label)
        ours = inspect.isclass(found) and found.__module__.startswith("jaxalign")
        if ours and not is_protocol(found) and not issubclass(found, BaseException):
            yield f"{name}.{label}", found


def undocumented_fields(found: type) -> list[str]:
    """The fields of a NamedTuple or dataclass without a line below them, or one in the class's own Fields."""
    body = ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]
    assert isinstance(body, ast.ClassDef)
    lines = re.findall(r"^ +(\w[\w, ]*): ", inspect.getdoc(found) or "", re.MULTILINE)
    listed = [word.strip() for line in lines for word in line.split(",")]
    out = []
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            line = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not line and node.target.id not in listed and not node.target.id.startswith("_"):
                out.append(node.target.id)
    return out


def is_protocol(found: type) -> bool:
    return getattr(found, "_is_protocol", False)


def sections(doc: str) -> dict[str, str]:
    """Title -> text of the sections Args, Returns and Raises."""
    parts = SECTION.split(inspect.cleandoc(doc))
    return {
        title: re.split(r"^(?=\S)", text, maxsplit=1, flags=re.MULTILINE)[0]
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def named(text: str) -> list[str]:
    """The parameters that a section Args names: the words before the colon of a line that is not a continued one."""
    lines = re.findall(r"^  ([\w*][\w, *]*):(?:\s|$)", text, re.MULTILINE)
    return [word.strip().lstrip("*") for line in lines for word in line.split(",") if word.strip()]


def raises(function: Callable[..., Any]) -> bool:
    """Whether the function's own body raises a ValueError, or calls a check that does."""
    body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(body):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if re.match(r"_?check_|_check$|(per_row|count|number|open_\w+)$", called):
                return True
    return False


def complaints(function: Callable[..., Any]) -> list[str]:
    """What the docstring of a function lacks or has too much."""
    doc = inspect.getdoc(function) or ""
    if not doc:
        return ["no docstring"]
    found, out = sections(doc), []
    signature = inspect.signature(function)
    parameters = [name for name in signature.parameters if name != "self"]
    if parameters:
        listed = named(found.get("Args", ""))
        out += [f"Args without {name}" for name in parameters if name not in listed]
        out += [f"Args with {name}, which it does not take" for name in listed if name not in parameters]
    if signature.return_annotation not in (None, "None", "NoReturn") and "Returns" not in found:
        out.append("no Returns")
    if raises(function) and "Raises" not in found:
        out.append("no Raises")
    if "Raises" in found and not re.match(r"\s*\w+(Error|Exit):", found["Raises"]):
        out.append("Raises without the name of an error")
    return out


FUNCTIONS = {name: function for package in LISTED.split() for name, function in public(package)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_says_what_is_taken_given_and_raised(name):
    assert complaints(FUNCTIONS[name]) == []


CLASSES = {name: found for package in LISTED.split() for name, found in classes(package)}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_and_each_of_its_fields_say_what_they_hold(name):
    found = CLASSES[name]
    own = vars(found).get("__doc__") or ""
    assert own
    assert not own.startswith(f"{found.__name__}(")  # which a NamedTuple or dataclass is given
    assert undocumented_fields(found) == []


def test_the_whole_library_is_looked_at():
    assert len(FUNCTIONS) > 300
    assert len(CLASSES) > 60


# What the checks see --------------------------------------------------------------------------------------------------


def whole(left: int, right: int) -> int:
    """Adds.

    Args:
      left, right: numbers.

    Returns:
      The sum.

    Raises:
      ValueError: a left below 0.
    """
    if left < 0:
        raise ValueError
    return left + right


def lacking(part: str) -> Callable[..., Any]:
    """`whole` without a part of its docstring."""
    text = inspect.cleandoc(whole.__doc__ or "")

    def shorter(left: int, right: int) -> int:
        raise ValueError

    shorter.__doc__ = text.replace(part, "") if part else None
    return shorter


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("", ["no docstring"]),
        ("left, ", ["Args without left"]),
        ("Args:\n  left, right: numbers.\n", ["Args without left", "Args without right"]),
        ("Returns:\n  The sum.\n", ["no Returns"]),
        ("Raises:\n  ValueError: a left below 0.", ["no Raises"]),
        ("ValueError: ", ["Raises without the name of an error"]),
    ],
    ids=["all", "one name", "Args", "Returns", "Raises", "the error"],
)
def test_what_a_docstring_lacks_is_seen(part, expected):
    assert complaints(whole) == []
    assert complaints(lacking(part)) == expected


def test_a_parameter_that_is_gone_and_a_check_that_raises_are_seen():
    def renamed(first: int, right: int) -> int:
        check_something(first)
        return right

    renamed.__doc__ = (inspect.cleandoc(whole.__doc__ or "")).split("\n\nRaises:")[0]
    assert complaints(renamed) == ["Args without first", "Args with left, which it does not take", "no Raises"]


def check_something(value: int) -> None:
    """For the test above."""


class Half(NamedTuple):
    """A result.

    Fields:
      first: is said here.
    """

    first: int
    second: int
    """Is said here."""
    third: int


def test_a_field_without_a_line_is_seen():
    assert undocumented_fields(Half) == ["third"]

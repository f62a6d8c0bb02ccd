"""The command line: options from a frozen dataclass.

Options come from tyro: the fields of a dataclass, their docstrings as help, unknown ones refused. `--config FILE` gives
defaults that the command line overrides.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import tomllib
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

C = TypeVar("C")


def parse(config: type[C], *, description: str, args: Sequence[str] | None = None) -> C:
    """The config from the command line (sys.argv when args is None), over the defaults of `--config FILE` if given.

    FILE is JSON or TOML with the field names as keys; the config.json of a run is such a file. An option on the
    command line replaces the file's value whole, a repeatable one too. An unknown option ends the program with tyro's
    message; an unknown key of FILE, or a value of another type than the field's, is a ValueError that names it.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    default: Any = None
    path = _config_option(arguments)
    if path is not None:
        given = {a.partition("=")[0][2:].replace("-", "_") for a in arguments if a.startswith("--")}
        default = _from_file(config, path, given)
    extra = {} if default is None else {"default": default}
    return tyro.cli(config, args=arguments, description=description, **extra)


def _config_option(arguments: Sequence[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _from_file(config: type[C], path: str, given: set[str]) -> C:
    """The config of a file, without the fields that the command line gives."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"config: expected a JSON or TOML file, found none at {path}")
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except ValueError as error:  # of the encoding, of JSON and of TOML
        raise ValueError(f"config: expected JSON or TOML in {path}, found {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: expected field names and values in {path}, found a {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"config: expected keys among {sorted(fields)}, found {unknown} in {path}")
    hints = typing.get_type_hints(config)
    frozen = {name: _typed(name, value, hints[name], path) for name, value in values.items()}
    # tyro would append a repeatable option to its default, and asks for a required one that is dropped here.
    frozen = {name: value for name, value in frozen.items() if name not in given}
    missing: Any = tyro.MISSING
    for name, field in fields.items():
        if name not in frozen and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            frozen[name] = missing  # tyro then requires it on the command line
    return config(**frozen)


def _typed(name: str, value: Any, hint: Any, path: str) -> Any:
    """value as the field's type: lists become tuples, integers serve as floats. ValueError that names the field."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return _typed(name, value, option, path)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list) and inner[-1:] == (...,):
        return tuple(_typed(name, item, inner[0], path) for item in value)
    elif origin is typing.Literal:
        if value in inner:
            return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif origin is None and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{name}: expected {expected}, found {value!r} in {path}")

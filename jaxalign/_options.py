"""Options: a frozen dataclass from the command line, a file, or keywords.

A config is composed of groups: a field whose type is a dataclass is a group, and its fields are options beside the
config's own. Options have one flat set of names, `--learning-rate` whatever group `learning_rate` lies in. A script
that has other defaults than a group gives that field `default_factory=functools.partial(Group, option=value)`, also
where the group has required options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import pathlib
import re
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from jaxalign._files import TwiceError, once_each, printed, read_text

C = TypeVar("C")

LARGEST = 2**63 - 1
"""Of the whole numbers that an option takes, as arrays do."""


def parse(config: type[C], *, description: str, args: Sequence[str] | None = None, prog: str | None = None) -> C:
    """The config from the command line, over the defaults of `--config FILE` where that is given.

    FILE is JSON or TOML with the options' names as keys, as config.json of a run holds them; a table under a group's
    name may hold that group's. An option on the command line replaces the file's value whole, a repeatable one too.
    preset:NAME stands for the file NAME.toml of train/presets, whose name begins with that of the job.

    Args:
      config: the dataclass; the docstrings of its fields are the options' help.
      description: text above the options in --help.
      args: the command line, sys.argv[1:] where it is None.
      prog: the program's name in messages.

    Raises:
      SystemExit: an option is not known, or a required one is missing: exit code 2 and a message that names it.
      ValueError: a key of FILE is not an option, or its value is of another type; two groups have one option.
    """
    import tyro  # it takes a fifth of a second, and only a command line needs it

    description = re.sub(r"(?<!\n)\n(?=(python -m|jaxalign) )", "\n\n", description)  # tyro joins lines
    arguments = list(sys.argv[1:] if args is None else args)
    prog = prog or pathlib.Path(sys.argv[0]).name
    given = {word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")}
    known, path, values = _options(config), _config_option(arguments), dict[str, Any]()
    if path is not None:
        # tyro would append a repeatable option to its default.
        values = {name: value for name, value in _read(config, path).items() if name not in given}
    default = _make(config, values, path or "", missing=tyro.MISSING)
    if "-h" not in arguments and "--help" not in arguments:
        lacking = [name for name, value in flat(default).items() if value is tyro.MISSING]
        for name in sorted(given):
            if name not in known and known.get(name.removeprefix("no_")) is not bool:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; the closest is {_dashed(close[0])}" if close else ""
                _refuse(prog, f"{_dashed(name)}: expected an option of --help, found none of this name{hint}")
        for name in lacking:
            if name not in given:
                _refuse(prog, f"{_dashed(name)}: expected a value, which is required, found none")
    # Given whole, since tyro would call a default factory of a group that has required options.
    extra: dict[str, Any] = {} if path is None and not _groups(config) else {"default": default}
    groups_flat, said = (tyro.conf.OmitArgPrefixes,), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: C = tyro.cli(config, args=arguments, description=description, prog=prog, config=groups_flat, **extra)
    except SystemExit as stop:
        if stop.code and type(stop) is SystemExit:  # a signal's is one of its own
            # The sentence within tyro's frame; the option's help follows it.
            words = " ".join(re.sub(r"[\u2500-\u257f]|-{5,}", " ", said.getvalue()).split())
            _refuse(prog, _worded(words.partition(" Argument helptext")[0]))
        raise
    for name, value in flat(found).items():
        if isinstance(value, int) and not -LARGEST - 1 <= value <= LARGEST:
            _refuse(prog, f"{_dashed(name)}: expected a whole number of at most 64 bits, found {printed(value)}")
    return found


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_WORDS = (
    (
        r"Error parsing (--\S+): .*invalid literal for int\(\) with base 10: ('.*?')",
        r"\1: expected a whole number, found \2",
    ),
    (r"Error parsing (--\S+): .*could not convert string to float: ('.*?')", r"\1: expected a number, found \2"),
    (
        r"Error parsing (--\S+): Could not find valid parse for arguments: (\[.*?\])",
        r"\1: expected other values, found \2",
    ),
    (r"Error parsing (--\S+): (.*)", r"\1: \2"),
    (r"invalid choice ('.*?') for argument '(--\S+)'\. Expected one of (\(.*?\))", r"\2: expected one of \3, found \1"),
    (r"Missing value for argument '(--\S+)'", r"\1: expected a value, found none"),
    (r"Unrecognized options: (.*?)(?: For full helptext.*)?$", r"expected options as --name VALUE, found '\1'"),
)
"""What tyro says, and how it is said in the form of every other message."""


def _worded(words: str) -> str:
    for pattern, form in _WORDS:
        if found := re.search(pattern, words):
            return found.expand(form)
    return words


def _refuse(prog: str, words: str) -> NoReturn:
    """Ends the program for its usage, with one line."""
    print(f"{prog}: error: {words}", file=sys.stderr)
    raise SystemExit(2)


def from_fields(config: type[C], values: Mapping[str, Any], *, where: str = "the options") -> C:
    """The config of a flat mapping from option to value.

    Args:
      config: the dataclass.
      values: option -> value; a group's name may map to its own options.
      where: what the values are of, for messages.

    Raises:
      ValueError: a name that is no option, a required option that is missing, a value of another type.
    """
    return _make(config, _checked(config, values, where), where, missing=None)


def flat_values(config: type[Any], values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Option -> value of a mapping in which a group's name may map to its own options, as files hold them.

    ValueError: an option that has a value of its own and one in its group; `where` says what the values are of.
    """
    groups, opened = _groups(config), dict[str, Any]()
    for key, value in values.items():
        more = (
            flat_values(groups[key], value, where=where) if key in groups and isinstance(value, dict) else {key: value}
        )
        twice = sorted(set(more) & set(opened))
        if twice:
            both = " and ".join(printed(values[twice[0]]) for values in (opened, more))
            raise ValueError(f"{twice[0]}: expected one value, found {both} in {where}")
        opened |= more
    return opened


def defaults(config: type[Any]) -> dict[str, Any]:
    """Option -> default, of the options that have one."""
    required = object()
    return {
        name: value for name, value in flat(_make(config, {}, "", missing=required)).items() if value is not required
    }


def names(config: type[Any]) -> set[str]:
    """The options of a config, those of its groups among them."""
    return set(_options(config))


def flat(config: Any) -> dict[str, Any]:
    """Option -> value of a config, its groups' options beside its own."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def _config_option(arguments: Sequence[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _read(config: type[Any], path: str) -> dict[str, Any]:
    """Option -> value of a file, each of its option's type."""
    file = _preset(path.removeprefix(PRESET), job_of(config)) if path.startswith(PRESET) else pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"config: expected a JSON or TOML file, found none at {path}")
    try:
        text = read_text(file)
        if file.suffix == ".toml":
            values = tomllib.loads(text.replace("\r\n", "\n"))
        else:
            values = json.loads(text, object_pairs_hook=once_each)
    except TwiceError as error:
        raise ValueError(f"config: expected each field once, found {error} in {path}") from None
    except (ValueError, RecursionError) as error:  # of the encoding, of JSON and of TOML
        raise ValueError(f"config: expected JSON or TOML in {path}, found {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: expected field names and values in {path}, found a {type(values).__name__}")
    return _checked(config, values, path, name="config")


PRESET = "preset:"
"""What a name of a file in train/presets begins with, as --config takes it."""


def _preset(name: str, job: str) -> pathlib.Path:
    """The file of a preset of a job. ValueError that lists them where there is none of this name."""
    here = pathlib.Path(__file__).parent
    folders = [folder / "train" / "presets" for folder in (here / "launch", here.parent)]  # of a wheel, of a clone
    found = {path.stem: path for folder in folders for path in folder.glob(f"{job}_*.toml")}
    if name not in found:
        known = f"one of {', '.join(sorted(found))}" if found else "a file, since there are no presets"
        raise ValueError(f"config: expected {known} for {job}, found {PRESET}{name}")
    return found[name]


def job_of(config: type[Any]) -> str:
    """The name of the job whose Config this is: that of its module, also where this runs as a program."""
    module = config.__module__
    spec = getattr(sys.modules[module], "__spec__", None)
    return str(module if module != "__main__" or spec is None else spec.name).rpartition(".")[2]


def _checked(config: type[Any], values: Mapping[str, Any], where: str, *, name: str = "options") -> dict[str, Any]:
    """The values by option, with groups opened. ValueErrors: a name that is no option, a value of another type."""
    known, opened = _options(config), flat_values(config, values, where=where)
    unknown = sorted(set(opened) - set(known))
    if unknown:
        raise ValueError(f"{name}: expected keys among {sorted(known)}, found {printed(unknown)} in {where}")
    return {key: _typed(key, value, known[key], where) for key, value in opened.items()}


def _groups(config: type[Any]) -> dict[str, type[Any]]:
    """Field -> dataclass, of the fields that are groups."""
    hints = typing.get_type_hints(config)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def _options(config: type[Any]) -> dict[str, Any]:
    """Option -> type. ValueError: two groups, or a group and the config, have an option of one name."""
    groups, found = _groups(config), dict[str, Any]()
    for name, hint in typing.get_type_hints(config).items():
        more = _options(groups[name]) if name in groups else {name: hint}
        twice = sorted(set(more) & set(found))
        if twice:
            raise ValueError(f"{twice[0]}: expected one option of this name in {config.__qualname__}, found two")
        found |= more
    return found


def _make(
    config: type[C], values: Mapping[str, Any], where: str, *, missing: Any, given: Mapping[str, Any] | None = None
) -> C:
    """The config of checked values over `given`, field -> value, and the fields' own defaults; `missing` stands for a
    required option, which is a ValueError where it is None."""
    groups, given, made = _groups(config), given or {}, dict[str, Any]()
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name = field.name
        if name in groups:
            made[name] = _make(groups[name], values, where, missing=missing, given=_group_defaults(field, given))
        elif name in values:
            made[name] = values[name]
        elif name in given:
            made[name] = given[name]
        elif field.default is not dataclasses.MISSING:
            made[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            made[name] = field.default_factory()
        elif missing is None:
            raise ValueError(f"{name}: expected a value, found none in {where}")
        else:
            made[name] = missing
    return config(**made)


def _group_defaults(field: dataclasses.Field[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Field -> value of a group, where these are not the group's own defaults."""
    group, factory = given.get(field.name, field.default), field.default_factory
    if dataclasses.is_dataclass(group):
        return {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    if isinstance(factory, functools.partial):  # which may lack the group's required options
        return dict(factory.keywords)
    return {}


def _typed(name: str, value: Any, hint: Any, where: str) -> Any:
    """value as the field's type: lists become tuples, integers serve as floats. ValueError that names the field."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return _typed(name, value, option, where)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list | tuple) and inner[-1:] == (...,):
        return tuple(_typed(name, item, inner[0], where) for item in value)
    elif origin is typing.Literal:
        if value in inner:
            return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    elif hint is int and isinstance(value, int) and not -LARGEST - 1 <= value <= LARGEST:
        raise ValueError(f"{name}: expected int of at most 64 bits, found {printed(value)} in {where}")
    elif origin is None and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{name}: expected {expected}, found {printed(value)} in {where}")

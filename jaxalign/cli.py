"""What every script of train/ and eval/ shares: options from a frozen dataclass, a run folder, a mesh.

Options come from tyro: the fields of a dataclass, their docstrings as help, unknown ones refused. `--config FILE` gives
defaults that the command line overrides.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tomllib
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import tyro
from tqdm import tqdm

C = TypeVar("C")

PACKAGES = ("jaxalign", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")


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


def write_json(path: pathlib.Path, values: Any) -> None:
    """Indented JSON under a temporary name, then renamed. ValueError for NaN and infinities, which are not JSON."""
    text = json.dumps(values, indent=2, default=str, allow_nan=False)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def open_run(folder: str | os.PathLike[str], config: Any, *, inputs: Sequence[str] = ()) -> pathlib.Path:
    """The run folder, with config.json, versions.json and inputs.json. A folder of another run is refused.

    The same config opens the folder again, so that the run can go on; the fields `config` and `out` are not compared.
    inputs: files and folders that the run reads; their sizes and times of change are kept, since a run that goes on
    with other weights would mix two runs.
    ValueError: the folder holds a run whose config differs (the field is named) or whose inputs have changed (the file
    is named), or files but no config.json.
    """
    out = pathlib.Path(folder)
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    compared = {name: value for name, value in values.items() if name not in ("config", "out")}
    stored = out / "config.json"
    if stored.exists():
        before = json.loads(stored.read_text())
        for name in sorted(set(compared) | (set(before) - {"config", "out"})):
            if before.get(name) != compared.get(name):
                raise ValueError(
                    f"{name}: expected {before.get(name)!r} of the run in {out}, found {compared.get(name)!r}; "
                    "name another --out, or remove that folder"
                )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"out: expected a new or empty folder, or one of this run, found files in {out}")
    stamps, known = _stamps(inputs), out / "inputs.json"
    if known.exists():
        before = json.loads(known.read_text())
        changed = sorted(name for name in set(before) | set(stamps) if before.get(name) != stamps.get(name))
        if changed:
            raise ValueError(
                f"inputs: expected the files that the run in {out} began with, found {changed} changed; "
                "name another --out, or remove that folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    for path, found in ((known, stamps), (stored, values), (out / "versions.json", versions())):
        # Another run may read this folder and keep the times of its files: what is the same is not written again.
        if not path.exists() or json.loads(path.read_text()) != found:
            write_json(path, found)
    return out


def changed_inputs(folder: pathlib.Path, *, inputs: Sequence[str]) -> list[str]:
    """Of the files that `inputs` name, those that have changed since the run of a folder began with them."""
    before, now = json.loads((folder / "inputs.json").read_text()), _stamps(inputs)
    return sorted(name for name in now if name in before and before[name] != now[name])


def _stamps(inputs: Sequence[str]) -> dict[str, list[int]]:
    """File -> [size in bytes, time of change in ns], for files and the files directly in folders."""
    files = [path for name in inputs if name for path in _files(pathlib.Path(name))]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path] * path.is_file()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, and the device."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class _Lines:
    """A stream that ends each of tqdm's redrawn lines: a pipe or a log file keeps them all."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.replace("\r", "\n")
        if text.strip():
            self.stream.write(text.strip("\n") + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(stage: str, total: int, *, initial: int = 0, unit: str = "it") -> Any:
    """A tqdm bar on stderr: stage, count, rate and ETA. Redrawn on a terminal; elsewhere one line every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=stage,
        unit=unit,
        mininterval=0.2 if terminal else 10.0,
        maxinterval=10.0 if terminal else 60.0,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        ascii=not terminal,
        ncols=None if terminal else 110,
        dynamic_ncols=terminal,
    )


def make_mesh(spec: str) -> jax.sharding.Mesh | None:
    """A mesh from "data=N" (N devices along the data axis), None from "". ValueError for another form or too many
    devices."""
    if not spec:
        return None
    name, _, count = spec.partition("=")
    if name != "data" or not count.isdigit() or int(count) < 1:
        raise ValueError(f"mesh: expected data=N with N >= 1, found {spec!r}")
    if int(count) > len(jax.devices()):
        raise ValueError(f"mesh: expected at most {len(jax.devices())} devices, found {spec!r}")
    return jax.sharding.Mesh(np.asarray(jax.devices()[: int(count)]), ("data",))

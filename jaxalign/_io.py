"""JSON files that are whole or absent, and run folders that refuse another run's inputs."""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

from jaxalign import _hosts, _options

FREE = {"config", "out", "mesh", "profile", "peak_tflops", "device_memory", "track"}
"""Options in which a run may differ when it goes on: they do not change what is computed, and numbers on another mesh
are equal within rounding."""

PACKAGES = ("jaxalign", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")


def write_json(path: pathlib.Path, values: Any) -> None:
    """Indented JSON under a temporary name, then renamed; of several processes, all of which have to call it, the first
    writes. ValueError for NaN and infinities, which are not JSON."""
    with _hosts.together():
        if _hosts.is_first():
            _write_json(path, values)


def _write_json(path: pathlib.Path, values: Any) -> None:
    text = json.dumps(values, indent=2, default=str, allow_nan=False)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def open_run(folder: str | os.PathLike[str], config: Any, *, inputs: Sequence[str] = ()) -> pathlib.Path:
    """The run folder, with config.json, versions.json and inputs.json. A folder of another run is refused.

    The same config opens the folder again, so that the run can go on. config.json holds the value of each option,
    those of groups beside the config's own; an option that is not in it, since it came later, had its default.

    Args:
      folder: the run folder, new, empty or of this run.
      config: dataclass of options; those of `FREE` are not compared.
      inputs: files and folders that the run reads; their sizes and times of change are kept, since a run that goes on
        with other weights would mix two runs.

    Returns:
      The folder.

    Raises:
      ValueError: the folder holds a run with another value of an option (it is named), or one whose inputs have changed
        (the file is named), or files but no config.json; of several processes, one that does not see the folder of the
        first, or has other options.
    """
    out = pathlib.Path(folder)
    return _hosts.first_then_others(lambda: _open(out, config, inputs), lambda: _opened(out, config))


def _opened(out: pathlib.Path, config: Any) -> pathlib.Path:
    """The run folder that the first process has opened."""
    if not (out / "config.json").exists():
        raise ValueError(
            f"out: expected a folder that all {_hosts.count()} processes share, found no config.json of process 0 in "
            f"{out} on process {_hosts.index()} ({platform.node()})"
        )
    _check_options(out, config)
    return out


def _check_options(out: pathlib.Path, config: Any) -> None:
    """ValueError where the run of a folder has another value of an option."""
    stored, values = out / "config.json", _as_json(_options.flat(config))
    options, found = type(config), json.loads(stored.read_text())
    before = _as_json(_options.defaults(options)) | _options.flat_values(options, found, where=str(stored))
    for name in sorted((set(values) | set(before)) - FREE):
        if before.get(name) != values.get(name):
            raise ValueError(
                f"{name}: expected {before.get(name)!r} of the run in {out}, found {values.get(name)!r}; "
                "name another --out, or remove that folder"
            )


def _open(out: pathlib.Path, config: Any, inputs: Sequence[str]) -> pathlib.Path:
    values, stored = _as_json(_options.flat(config)), out / "config.json"
    if stored.exists():
        _check_options(out, config)
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
            _write_json(path, found)
    return out


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values as they are read from JSON again: tuples are lists."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


def changed_inputs(folder: pathlib.Path, *, inputs: Sequence[str]) -> list[str]:
    """Of the files that `inputs` name, those that have changed since the run of a folder began with them."""
    before, now = json.loads((folder / "inputs.json").read_text()), _stamps(inputs)
    return sorted(name for name in now if name in before and before[name] != now[name])


def _stamps(inputs: Sequence[str]) -> dict[str, list[int]]:
    """File -> [size in bytes, time of change in ns], for files and the files directly in folders."""
    files = [path for name in inputs if name for part in expand_names(name) for path in _files(_without_split(part))]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def expand_names(source: str | os.PathLike[str]) -> list[str]:
    """The names in a list with commas between them; a glob stands for the files that it matches, in alphabetical order.

    What exists under the whole name is one name; a glob that matches nothing stays as it is.
    """
    whole = os.fspath(source)
    if os.path.exists(whole):
        return [whole]
    names: list[str] = []
    for part in filter(None, (part.strip() for part in whole.split(","))):
        if os.path.exists(part) or not glob.has_magic(part.partition("@")[0]):
            names.append(part)
            continue
        names += sorted(glob.glob(part, recursive=True)) or [part]
    return names


def _without_split(name: str) -> pathlib.Path:
    """The folder of FOLDER@SPLIT."""
    folder = pathlib.Path(name.rpartition("@")[0] or name)
    return folder if folder.is_dir() and not os.path.exists(name) else pathlib.Path(name)


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

"""Run folders: opened by one job at a time, and refused to a run that would not give the same results."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxalign import _hosts, _io, _leftovers, _locks, _options

FREE = {
    *("config", "out", "mesh", "profile", "peak_tflops", "device_memory", "track", "save_every", "log_every"),
    *("inspect", "stream", "quiet"),
}
"""Options in which a run may differ when it goes on: they do not change what is computed, and numbers on another mesh
are equal within rounding."""

GROWING = {"steps", "epochs"}
"""Options of a run that may become larger: it goes on from its last checkpoint."""

PACKAGES = ("jaxalign", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")
CONFIG, INPUTS, VERSIONS, SUMMARY = "config.json", "inputs.json", "versions.json", "summary.json"
ROUNDS = "rounds"
"""Folder of run folders that a job opens before it has read its inputs."""

ELSE = "name another --out, or remove that folder"
ROOT = pathlib.Path(__file__).resolve().parent.parent
_growing: set[pathlib.Path] = set()  # folders whose runs go on for more steps
_pending: dict[pathlib.Path, Callable[[], None]] = {}  # folder -> what is written, or looked at, once inputs are read


class Input(NamedTuple):
    """A file that a run reads."""

    name: str
    """Its path as it was named; of the library's own files that from their root."""
    place: str
    """Its absolute path, or the name where that is from the library's root."""
    size: int
    """Bytes."""
    changed: int
    """Time of change [ns]."""
    digest: str = ""
    """Of its bytes; "" where it is not known yet."""


def open_run(
    folder: str | os.PathLike[str], config: Any, *, inputs: Sequence[str] = (), later: bool = False
) -> pathlib.Path:
    """The run folder, with config.json, versions.json and inputs.json, locked until the job ends. A folder of another
    run is refused.

    The same config opens the folder again, so that the run can go on. config.json holds the value of each option,
    those of groups beside the config's own; an option that is not in it, since it came later, had its default. Only
    what changes results is refused: options of `FREE` are not compared, those of `GROWING` may be larger, paths are
    compared by what they lead to, and files by their bytes. A finished folder (summary.json) is not locked.

    Args:
      folder: the run folder, new, empty or of this run.
      config: dataclass of options.
      inputs: files and folders that the run reads; their digests are kept, since a run that goes on with other weights
        would mix two runs.
      later: write nothing before `begin`, which is called once the inputs are read: a misspelt name leaves no folder.

    Returns:
      The folder.

    Raises:
      ValueError: the folder holds a run with another value of an option (it is named), or one whose inputs have changed
        (the file is named), or files but no config.json, or a damaged one; another process writes to it; of several
        processes, one that does not see the folder of the first, or has other options.
    """
    out = pathlib.Path(folder)
    with _hosts.together():
        if _hosts.is_first():
            _pending[out.resolve()] = _opened(out, config, inputs)
        else:
            _pending[out.resolve()] = functools.partial(_check_shared, out, config)
    if not later:
        begin(out)
    return out


def begin(out: pathlib.Path) -> None:
    """Writes config.json, inputs.json and versions.json of a folder that was opened to be written later. All processes
    have to call it: the others look whether they see what the first has written. ValueError where one does not, or has
    other options."""
    then = _pending.pop(out.resolve(), lambda: None)
    _hosts.first_then_others(then, then)
    _growing.discard(out.resolve())


def goes_on(out: pathlib.Path) -> bool:
    """Whether the run of a folder is to go on beyond its former end, for more steps."""
    return out.resolve() in _growing


def release(out: pathlib.Path) -> None:
    """Gives the lock of a run folder back."""
    _locks.release(out)


def _opened(out: pathlib.Path, config: Any, inputs: Sequence[str]) -> Callable[[], None]:
    """Checks a folder, and gives what writes its first files."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, found a file {out}")
    finished, had = (out / SUMMARY).exists(), _locks.held(out)
    try:
        if finished:
            _locks.clear(out)  # of a job that was killed when it had written its summary
        else:
            _lock(out)
        found, values = _inputs(inputs), _as_json(_options.flat(config))
        digests, grown = [""] * len(found), ""
        if _is_run(out):
            kept = _kept_inputs(out)
            same = len(kept.files) == len(found) and all(_equal(a, b) for a, b in zip(kept.files, found, strict=True))
            moved = {os.path.normpath(name) for name in inputs if name} | _places(found) if same else set[str]()
            grown = check_options(out, config, values, kept.folder, moved)
            if not same and (changed := _changed(kept.files, found)):
                raise ValueError(
                    f"inputs: expected the files that the run in {out} began with, found {changed} changed; {ELSE}"
                )
            digests = [x.digest for x in kept.files] if same else digests
        elif out.exists() and any(_foreign(path) for path in out.iterdir()):
            raise ValueError(f"out: expected a new or empty folder, or one of this run, found files in {out}")
        _growing.discard(out.resolve())
        if grown:
            _growing.add(out.resolve())
            if finished:
                _lock(out)
        if _locks.held(out):
            _leftovers.remove(out)  # now that the folder is known to be this run's
        if grown:
            print(f"{grown}; the run goes on from its last checkpoint", flush=True)
    except BaseException:
        if not had:
            _locks.release(out)
        raise
    return functools.partial(_write, out, values, found, digests, grown=bool(grown))


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
    """A block in which no other job writes to a folder, or to those that are opened in it; of several processes the
    first has the lock. ValueError where another job has it."""
    with _locks.released():
        with _hosts.together():
            if _hosts.is_first():
                _lock(out)
        yield


def _lock(out: pathlib.Path) -> None:
    if passed := _locks.take(out):
        print(f"note: out: {passed}, is passed over in {out}", file=sys.stderr)


def _is_run(out: pathlib.Path) -> bool:
    """Whether a folder holds the config.json of a run, which others stand beside, and not that of a model."""
    return (out / CONFIG).exists() and any((out / name).exists() for name in (INPUTS, VERSIONS, SUMMARY))


def _foreign(path: pathlib.Path) -> bool:
    """Whether a file in a folder without config.json is not of a run that was killed before it wrote that."""
    known = path.name in (INPUTS, VERSIONS, ROUNDS) or path.name.startswith(_locks.NAME)
    return not known and not _leftovers.is_leftover(path)


def _places(found: Sequence[Input]) -> set[str]:
    """Paths of files and of the folders around them."""
    return {os.path.normpath(path) for x in found for path in (x.name, pathlib.Path(x.name).parent)}


def _write(
    out: pathlib.Path, values: dict[str, Any], found: list[Input], digests: Sequence[str], *, grown: bool
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if grown:  # first: where summary.json is, the run is whole
        (out / SUMMARY).unlink(missing_ok=True)
    new = iter(_io.file_digests([_path(x) for x, digest in zip(found, digests, strict=True) if not digest]))
    files = [[x.name, x.size, x.changed, digest or next(new)] for x, digest in zip(found, digests, strict=True)]
    for name, wanted in ((INPUTS, {"folder": os.getcwd(), "files": files}), (CONFIG, values), (VERSIONS, versions())):
        path = out / name
        # Another run may read this folder and keep the times of its files: what is the same is not written again.
        if not path.exists() or _io.read_json(path, then=f"remove {path}, which is written anew") != wanted:
            _io.write_own_json(path, wanted)


def check_options(
    out: pathlib.Path, config: Any, values: dict[str, Any], folder: str, moved: Collection[str] = ()
) -> str:
    """Compares options with those of a run folder.

    Args:
      out: the run folder.
      config: dataclass of options.
      values: its options, flat, as JSON has them.
      folder: in which the run began, from where its relative paths lead.
      moved: paths of inputs that hold the bytes of those that the run began with, wherever they lie.

    Returns:
      What has grown, for a message; "" where nothing has.

    Raises:
      ValueError: another value of an option that changes results; it is named.
    """
    stored, options, grown = out / CONFIG, type(config), ""
    found = _io.read_json(stored, then=f"write the options of that run there again, or {ELSE}")
    before = _as_json(_options.defaults(options)) | _options.flat_values(options, found, where=str(stored))
    for name in sorted((set(values) | set(before)) - FREE):
        a, b = before.get(name), values.get(name)
        if a == b or same_place(a, b, folder, moved):
            continue
        if name in GROWING and isinstance(a, int | float) and isinstance(b, int | float) and 0 < a < b:
            grown = f"{name}: {b}, of which the run in {out} had {a}"
            continue
        raise ValueError(f"{name}: expected {a!r} of the run in {out}, found {b!r}; {ELSE}")
    return grown


def same_place(before: Any, now: Any, folder: str, moved: Collection[str] = ()) -> bool:
    """Whether two values of an option name the same files.

    Args:
      before: the value in the run's config.json.
      now: the value now.
      folder: in which that run began, from where its relative paths lead.
      moved: paths that hold the bytes of those of the run, wherever they lie.

    Returns:
      True where the words of both values are equal, lead to one place, or are among `moved`.
    """
    if not (isinstance(before, str) and isinstance(now, str) and before and now):
        both = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
        return both and all(a == b or same_place(a, b, folder, moved) for a, b in zip(before, now, strict=True))
    words = [re.split(r"([\s,+*()@:#]+)", value) for value in (before, now)]
    if len(words[0]) != len(words[1]):
        return False
    return all(
        a == b or _place(a, folder) == _place(b, os.getcwd()) or os.path.normpath(b) in moved
        for a, b in zip(*words, strict=True)
    )


def _place(name: str, folder: str) -> str:
    return os.path.realpath(os.path.join(folder, os.path.expanduser(name)))


def _check_shared(out: pathlib.Path, config: Any) -> None:
    """ValueError where another process does not see the folder that the first has opened, or has other options."""
    if not (out / CONFIG).exists():
        raise ValueError(
            f"out: expected a folder that all {_hosts.count()} processes share, found no config.json of process 0 in "
            f"{out} on process {_hosts.index()} ({platform.node()})"
        )
    check_options(out, config, _as_json(_options.flat(config)), os.getcwd())


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values as they are read from JSON again: tuples are lists."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return _as_json(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


# Inputs ---------------------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """What a run folder knows of its inputs."""

    folder: str  # in which the run began
    files: list[Input]


def _kept_inputs(out: pathlib.Path) -> _Kept:
    """The inputs that a run began with. ValueError for a damaged inputs.json."""
    path = out / INPUTS
    if not path.exists():
        return _Kept(os.getcwd(), [])
    then = f"remove that file if the inputs are surely those of the run, or {ELSE}"
    found = _io.read_json(path, then=then)
    try:
        if "files" not in found:  # from before there were digests
            files, folder = [(name, *stamp, "") for name, stamp in found.items()], os.getcwd()
        else:
            files, folder = found["files"], found["folder"]
        kept = [Input(name, _place_of(name, folder), size, at, digest) for name, size, at, digest in files]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{INPUTS}: expected files with sizes, times and digests, found others in {path}; {then}"
        ) from None
    return _Kept(folder, kept)


def _inputs(names: Sequence[str]) -> list[Input]:
    """The files that names stand for, without digests: files, and the files directly in folders."""
    found = {}
    for path in [path for name in names if name for part in _io.expand_names(name) for path in _files(_folder(part))]:
        known, name = path.stat(), _name(path)
        found[name] = Input(name, _place_of(name, os.getcwd()), known.st_size, known.st_mtime_ns)
    return list(found.values())


def _name(path: pathlib.Path) -> str:
    """A path as it was named; of the library's own sources that from their root, since a clone may be moved."""
    for top in ("jaxalign", "train", "eval", "examples"):
        if path.resolve().is_relative_to(ROOT / top):
            return str(path.resolve().relative_to(ROOT))
    return str(path)


def _place_of(name: str, folder: str) -> str:
    return name if not os.path.isabs(name) and (ROOT / name).is_file() else _place(name, folder)


def _folder(name: str) -> pathlib.Path:
    """The folder of FOLDER@SPLIT."""
    folder = pathlib.Path(name.rpartition("@")[0] or name)
    return folder if folder.is_dir() and not os.path.exists(name) else pathlib.Path(name)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file, or those of a folder that are not hidden, and that no repeated command writes anew."""
    if not path.is_dir():
        return [path] * path.is_file()
    mine = {INPUTS, VERSIONS, CONFIG} if (path / INPUTS).exists() else set[str]()
    return sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and p.name not in mine)


def _equal(before: Input, now: Input) -> bool:
    """Whether two files hold the same bytes, as far as is known; of one path, one size and one time they do."""
    if before.place == now.place and (before.size, before.changed) == (now.size, now.changed):
        return True
    if not before.digest or before.size != now.size or pathlib.Path(before.name).name != pathlib.Path(now.name).name:
        return False
    return before.digest == _io.file_digest(_path(now))


def _path(file: Input) -> pathlib.Path:
    """Where a file lies: of the library's own, below their root."""
    return ROOT / file.name if file.place == file.name else pathlib.Path(file.place)


def _changed(before: Sequence[Input], now: Sequence[Input]) -> list[str]:
    """Names of the files that are not those of before."""
    known, found = {x.place: x for x in before}, {x.place: x for x in now}
    both = {place for place in known.keys() & found.keys() if _equal(known[place], found[place])}
    return sorted({x.name for x in [*before, *now] if x.place not in both})


def changed_inputs(folder: pathlib.Path, *, inputs: Sequence[str]) -> list[str]:
    """Of the files that `inputs` name, those that have changed since the run of a folder began with them."""
    known = {x.place: x for x in _kept_inputs(folder).files}
    return sorted(x.name for x in _inputs(inputs) if x.place in known and not _equal(known[x.place], x))


def began_in(folder: pathlib.Path) -> str:
    """The working directory in which the run of a folder began, from where its relative paths lead."""
    return _kept_inputs(folder).folder


def stored_options(folder: pathlib.Path) -> Mapping[str, Any]:
    """What config.json of a run folder holds. ValueError for a damaged one."""
    found: dict[str, Any] = _io.read_json(folder / CONFIG, then=f"{folder} has to be made again")
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, and the device."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found

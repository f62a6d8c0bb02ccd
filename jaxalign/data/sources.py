"""Raw rows of whatever a user names: files, lists and globs of shards, folders, data sets of the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

from jaxalign._files import TwiceError, once_each
from jaxalign._io import expand_names
from jaxalign.data.rows import RowError, twice_row

RawRow: TypeAlias = tuple[str, "dict[str, Any] | RowError"]
"""("file:line", the row without its empty fields, or what is wrong with it)."""

KINDS = (".jsonl", ".json", ".csv", ".tsv")
COMPRESSED = ("", ".gz", ".zst")
SUFFIXES = (*(kind + end for kind in KINDS for end in COMPRESSED), ".parquet")
"""How files of rows end."""

PROMPT_SUFFIXES = (*SUFFIXES, *(".txt" + end for end in COMPRESSED))
"""How files of prompts end: a .txt file has a prompt in each line."""

SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
ZERO = RowError("not UTF-8", "expected UTF-8, found a zero byte, as UTF-16 has")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)+(:[\w.+-]+)?(@[\w.+%\[\]:-]+)?")


def raw_rows(source: str | os.PathLike[str], *, name: str = "data", lines: bool = False) -> Iterator[RawRow]:
    """Reads the rows of what a user names.

    Args:
      source: one of these, or several with commas between them:
        - a file that ends in one of SUFFIXES (with lines in one of PROMPT_SUFFIXES), or a glob of such files;
        - a folder: its files and those of its folders, in the order of their names. FOLDER@SPLIT takes those whose name
          begins with the split's, which must be given where there are several. A folder that `save_to_disk` of the
          package datasets wrote is read by that package;
        - OWNER/NAME, OWNER/NAME:CONFIG, OWNER/NAME/FOLDER, each with or without @SPLIT: a data set of the hub.
      name: of the option, for errors.
      lines: whether .txt files are taken.

    Yields:
      (where, row): "file:line" (for .json arrays and .parquet "file:number of the row", from 1) and a dict without
      fields that are None, or the RowError of a line that holds no row.

    Raises:
      ValueError: nothing of this name, a file of another kind, a file that is not what its name says, a package that is
        not installed.
    """
    suffixes = PROMPT_SUFFIXES if lines else SUFFIXES
    for part in expand_names(source):
        path = pathlib.Path(part)
        folder, _, split = part.rpartition("@")
        if path.is_file():
            yield from _file(_checked(path, suffixes, name), name)
        elif path.is_dir():
            yield from _folder(path, "", suffixes, name)
        elif folder and pathlib.Path(folder).is_dir():
            yield from _folder(pathlib.Path(folder), split, suffixes, name)
        elif _HUB.fullmatch(part) and not part.endswith((*suffixes, ".txt")):
            yield from _hub(part, name)
        else:
            _checked(path, suffixes, name)


def _checked(path: pathlib.Path, suffixes: tuple[str, ...], name: str) -> pathlib.Path:
    if not path.name.endswith(suffixes) or not path.is_file():
        found = "no such file" if not path.is_file() else f"suffix {path.suffix!r}"
        raise ValueError(f"{name}: expected a file that ends in {', '.join(suffixes)}, found {found} at {path}")
    return path


def _folder(folder: pathlib.Path, split: str, suffixes: tuple[str, ...], name: str) -> Iterator[RawRow]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        yield from _saved(folder, split, name)
        return
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name.endswith(suffixes)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    found = {path: _split_of(path, folder) for path in files}
    there = sorted({each for each in found.values() if each})
    if split:
        files = [path for path in files if found[path] == split]
    elif len(there) > 1:
        raise ValueError(f"{name}: expected a split, {folder}@SPLIT, found files of {', '.join(there)} in {folder}")
    if not files:
        what = f"of the split {split!r} (there are {there})" if split else f"that end in {', '.join(suffixes)}"
        raise ValueError(f"{name}: expected files {what}, found none in {folder}")
    for path in files:
        yield from _file(path, name)


def _split_of(path: pathlib.Path, folder: pathlib.Path) -> str:
    """The split that a file's name, or a folder above it, begins with; "" for none."""
    for part in reversed(path.relative_to(folder).parts):
        word = re.split(r"[^a-z]", part.lower())[0]
        if word in SPLITS:
            return word
    return ""


# Files ----------------------------------------------------------------------------------------------------------------


def _file(path: pathlib.Path, name: str) -> Iterator[RawRow]:
    if path.suffix == ".parquet":
        rows: Iterable[RawRow] = _parquet(path, name)
    else:
        raw = _bytes(path, name)
        kind = path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
        if kind == "txt":
            rows = _text_lines(path, raw)
        elif kind in ("csv", "tsv"):
            rows = _table(path, raw, "\t" if kind == "tsv" else ",", name)
        elif kind == "json" and raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            rows = _array(path, raw, name)
        else:
            rows = _json_lines(path, raw)
    for where, row in rows:
        yield where, row if isinstance(row, RowError) else {k: v for k, v in row.items() if v is not None}


def _bytes(path: pathlib.Path, name: str) -> bytes:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            return gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name}: expected gzip data, found {error} in {path}") from error
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{name}: expected zstandard for {path} (pip install 'jaxalign[zst]')") from error
        parts = []
        while raw:  # frames one after the other
            frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                parts.append(frame.decompress(raw))
            except zstandard.ZstdError as error:
                raise ValueError(f"{name}: expected zstandard data, found {error} in {path}") from error
            if not frame.eof:
                raise ValueError(f"{name}: expected zstandard data, found an end within it in {path}")
            raw = frame.unused_data
        return b"".join(parts)
    return raw


def _lines(raw: bytes, end: bytes = b"\n") -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end). Only newlines part lines: JSON text may hold U+2028 and its kind."""
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(end)
    if lines[-1] == b"":
        lines.pop()  # the end of the last line, not a line of its own
    for number, line in enumerate(lines, start=1):
        yield number, line.removesuffix(b"\r")


def _json_lines(path: pathlib.Path, raw: bytes) -> Iterator[RawRow]:
    for number, line in _lines(raw):
        if line.strip():
            yield f"{path}:{number}", _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | RowError:
    try:
        row = json.loads(line.decode(), object_pairs_hook=once_each)
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except TwiceError as error:
        return twice_row(error)
    except (ValueError, RecursionError) as error:  # of the encoding, of JSON, of its depth
        kind = "not UTF-8" if isinstance(error, UnicodeError) else "not JSON"
        return RowError(kind, f"expected JSON, found {error} (a line holds a JSON object in UTF-8)")
    return _checked_row(row)


def _checked_row(row: Any) -> dict[str, Any] | RowError:
    if isinstance(row, dict):
        return row
    return RowError("not an object", f"expected a JSON object, found {type(row).__name__}")


def _array(path: pathlib.Path, raw: bytes, name: str) -> Iterator[RawRow]:
    try:
        rows = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once_or_error)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected a JSON array in UTF-8, found {error} in {path}") from error
    for number, row in enumerate(rows, start=1):
        try:
            json.dumps(row, ensure_ascii=False, default=_raise).encode()
        except TwiceError as error:
            yield f"{path}:{number}", twice_row(error)
            continue
        except UnicodeError as error:
            yield f"{path}:{number}", RowError("not UTF-8", f"expected text, found {error}")
            continue
        yield f"{path}:{number}", _checked_row(row)


def _once_or_error(pairs: list[tuple[str, Any]]) -> Any:
    """The fields of an object; in the place of one that has a field twice, its error: others of the array are good."""
    try:
        return once_each(pairs)
    except TwiceError as error:
        return error


def _raise(error: TwiceError) -> NoReturn:
    raise error


def _text_lines(path: pathlib.Path, raw: bytes) -> Iterator[RawRow]:
    for number, line in _lines(raw, b"\n" if b"\n" in raw else b"\r"):
        try:
            row = {"prompt": line.decode()}
            yield f"{path}:{number}", ZERO if b"\0" in line else row
        except UnicodeDecodeError as error:
            yield f"{path}:{number}", RowError("not UTF-8", f"expected UTF-8, found {error}")


def _table(path: pathlib.Path, raw: bytes, delimiter: str, name: str) -> Iterator[RawRow]:
    """Rows of a table with a header; an empty cell is no field."""
    csv.field_size_limit(2**31 - 1)  # a cell holds a whole conversation
    text = raw.decode("utf-8-sig", "surrogateescape")  # what is no UTF-8 comes through, so that its row can be named
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield where, RowError("not CSV", f"expected a row of a table, found {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header) or "" in header:
                raise ValueError(f"{name}: expected a header of different names, found {header!r:.500} in {path}")
        elif any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
            yield where, RowError("not UTF-8", "expected UTF-8, found other bytes")
        elif any("\0" in cell for cell in cells):
            yield where, ZERO
        elif len(cells) != len(header):
            yield where, RowError("not CSV", f"expected {len(header)} cells as the header has, found {len(cells)}")
        else:
            yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _parquet(path: pathlib.Path, name: str) -> Iterator[RawRow]:
    try:
        from pyarrow import lib, parquet
    except ImportError as error:
        raise ValueError(f"{name}: expected pyarrow for .parquet files (pip install 'jaxalign[parquet]')") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if twice := [column for column in columns if columns.count(column) > 1]:
                raise ValueError(f"the column {twice[0]!r} twice")
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (lib.ArrowException, OSError, ValueError) as error:  # a ValueError: fields of one name within a column
        raise ValueError(f"{name}: expected a Parquet file, found {error} in {path}") from error


# The package datasets -------------------------------------------------------------------------------------------------


def _datasets(name: str, what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name}: expected the package datasets for {what} (pip install 'jaxalign[datasets]')"
        ) from error
    return datasets


def _saved(folder: pathlib.Path, split: str, name: str) -> Iterator[RawRow]:
    datasets = _datasets(name, f"the folder {folder}")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds, by the fault
        raise ValueError(f"{name}: expected a folder of the package datasets, found {error} in {folder}") from error
    if isinstance(found, Mapping):
        found = found[_one_split(split, list(found), str(folder), name)]
    elif split:
        raise ValueError(f"{name}: expected no split of a folder that has one data set, found {split!r} at {folder}")
    yield from _numbered(str(folder) + (f"@{split}" if split else ""), found)


def _hub(part: str, name: str) -> Iterator[RawRow]:
    missing = f"no file or folder {part}"
    datasets = _datasets(name, f"the data set {part} of the hub ({missing})")
    whole, _, split = part.partition("@")
    whole, _, config = whole.partition(":")
    owner, title, *inside = whole.split("/")
    options = {"data_dir": "/".join(inside)} if inside else {}
    try:
        if split:
            found = datasets.load_dataset(f"{owner}/{title}", config or None, split=split, **options)
        else:
            found = datasets.load_dataset(f"{owner}/{title}", config or None, **options)
    except Exception as error:  # of many kinds, by the fault
        raise ValueError(f"{name}: expected a data set of the hub, since there is {missing}, found {error}") from error
    if not split:
        split = _one_split("", list(found), part, name)
        found = found[split]
    yield from _numbered(f"{whole}@{split}", found)


def _one_split(split: str, there: list[str], what: str, name: str) -> str:
    if split and split not in there:
        raise ValueError(f"{name}: expected a split among {', '.join(there)}, found {split!r} in {what}")
    if not split and len(there) != 1:
        raise ValueError(f"{name}: expected a split, {what}@SPLIT, found {', '.join(there)}")
    return split or there[0]


def _numbered(where: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield f"{where}:{number}", {k: v for k, v in row.items() if v is not None}

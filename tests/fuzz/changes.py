"""Changes of a file that make a fuzzer's case: fields of its JSON, and bytes of what comes out.

A case is a dict of JSON, so that one that found a fault can be kept as a row: {"file": name, "fields": [[path, value],
…], "bytes": [[change, place, argument], …]}.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

DEEP = 5000

ODD: list[Any] = [
    *(None, True, False, "false", "true", "", "x", "\ud800", "../x", "/etc/passwd", "a/b", "\0", "-1", "1e3"),
    *(0, -1, -5, 1, 2, 3, 999, 2**31, 2**63, 10**12, 10**30, 0.0, -1.0, 0.5, 1e-320, 1e300, 1e308),
    *(float("nan"), float("inf"), float("-inf"), [], {}, [[]], [None], [1, "a"], {"a": 1}, {"0": "x"}, [10**12], ["x"]),
]
"""Values that files have where others belong."""

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.sampled_from(ODD)
)
values = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner), max_leaves=5
    ),
)
raw = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just("")),
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(
        st.just("insert"),
        st.floats(0, 1),
        st.sampled_from(["", "00", "efbbbf", "ff", "fffe", "0a", "22", "5b", "7b", "c3", "eda080", "7d7d", "2c2c"]),
    ),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(max_size=6).map(bytes.hex)),
    st.tuples(st.just("remove"), st.floats(0, 1), st.integers(1, 40)),
    st.tuples(st.just("all"), st.just(0), st.binary(max_size=60).map(bytes.hex)),
    st.tuples(st.sampled_from(["deep", "digits", "objects", "gone"]), st.floats(0, 1), st.just("")),
)


def cases(paths: dict[str, list[list[Any]]]) -> st.SearchStrategy[dict[str, Any]]:
    """Cases of some files.

    Args:
      paths: file -> the paths of its fields that are changed, [] for bytes alone. A path is a list of keys and indices.
    """

    def of(name: str) -> st.SearchStrategy[dict[str, Any]]:
        known = paths[name]
        field = st.tuples(st.sampled_from(known), values) if known else st.nothing()
        fields = st.lists(field, min_size=1, max_size=3) if known else st.just([])
        mixed = st.tuples(fields, st.lists(raw, max_size=2 if not known else 0))
        changed = st.one_of(mixed, st.tuples(st.just([]), st.lists(raw, min_size=1, max_size=2)))
        return changed.map(lambda both: {"file": name, "fields": [*map(list, both[0])], "bytes": [*map(list, both[1])]})

    return st.sampled_from(sorted(paths)).flatmap(of)


def changed(original: bytes, case: dict[str, Any]) -> bytes | None:
    """The bytes of a case's file; None where the file is gone."""
    data = original
    if case["fields"]:
        lines = original.decode().split("\n")
        single = not isinstance(case["fields"][0][0][0], int)
        tree: Any = json.loads(original) if single else [json.loads(line) for line in lines if line]
        for path, value in case["fields"]:
            _set(tree, path, value)
        text = json.dumps(tree) if single else "".join(json.dumps(row) + "\n" for row in tree)
        data = text.encode()
    for kind, where, argument in case["bytes"]:
        at = int(where * len(data))
        if kind == "gone":
            return None
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << argument)]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + bytes.fromhex(argument) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + argument :]
        elif kind == "all":
            data = bytes.fromhex(argument)
        elif kind in ("deep", "objects"):
            data = data[:at] + (b"[" if kind == "deep" else b'{"a":') * DEEP + data[at:]
        elif kind == "digits":
            data = data[:at] + b"9" * DEEP + data[at:]
    return data


def _set(tree: Any, path: list[Any], value: Any) -> None:
    for key in path[:-1]:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(tree, dict) or (isinstance(tree, list) and isinstance(path[-1], int) and path[-1] < len(tree)):
        tree[path[-1]] = copy.deepcopy(value)


def paths_of(tree: Any, *, further: tuple[str, ...] = (), depth: int = 4) -> list[list[Any]]:
    """The paths of all fields of a tree, and of further ones at its top."""
    found: list[list[Any]] = [[name] for name in further]

    def walk(value: Any, path: list[Any]) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, each in list(inner)[:12]:
            found.append([*path, key])
            if len(path) < depth:
                walk(each, [*path, key])

    walk(tree, [])
    return found

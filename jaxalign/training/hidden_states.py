"""Hidden states of a frozen base, computed once into shards on disk: what heads on it are trained on."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _io, _progress, _signals, models
from jaxalign.data import batches
from jaxalign.training.job import iterate
from jaxalign.types import Params

SHARD = 256
"""Rows of a shard."""

Collate = Callable[[list[Any]], dict[str, np.ndarray]]


def stored_states(
    folder: pathlib.Path, lm: models.LanguageModel, params: Params, rows: Sequence[Any], collate: Collate, *, size: int
) -> list[np.ndarray]:
    """Reads the base's hidden states of rows from a folder, after computing the shards that it lacks.

    Args:
      folder: shards NNNNN.npy, each whole or absent and with its digest beside it, and stamp.json, which names the base
        and the rows.
      lm: the base.
      params: its parameters.
      rows: the texts.
      collate: a list of b rows -> {"tokens", "mask" [b,L], right-padded, …}.
      size: rows that the base reads together.

    Returns:
      For each row its real tokens' states [length,D] in the model's type; the arrays lie on disk (np.memmap).

    Raises:
      ValueError: states of another base, other rows or another type; a shard that is damaged or not finite; a base
        whose states are not.
    """
    stamp = {"base": _digest(params), "rows": batches.fingerprint(rows), "dtype": str(lm.dtype), "shard": SHARD}
    paths = [folder / f"{k:05d}.npy" for k in range(-(-len(rows) // SHARD))]

    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "stamp.json"
    before = _io.read_json(known, then=f"remove {folder}, which is made again") if known.exists() else stamp
    if wrong := sorted(name for name in stamp if before.get(name) != stamp[name]):
        raise ValueError(
            f"states: expected those of this run's {', '.join(wrong)}, found others in {folder}; remove that folder"
        )
    if not known.exists():
        _io.write_json(known, stamp)
    read = jax.jit(lambda params, tokens, mask: lm.hidden(params, tokens, mask=mask))  # one program for all shards
    with _progress.progress("hidden states", len(rows), unit="row") as bar:
        for part, path in zip(iterate(rows, SHARD), paths, strict=True):
            _signals.check()
            if not path.exists():
                _write(path, read, params, part, collate, size)
            bar.update(len(part))
    lengths = [int(collate([row])["mask"].sum()) for row in rows]
    found: list[np.ndarray] = []
    for k, path in enumerate(paths):
        own = lengths[k * SHARD : (k + 1) * SHARD]
        found += np.split(_mapped(path, sum(own), jnp.dtype(lm.dtype)), np.cumsum(own)[:-1])
    return found


def with_states(collate: Collate, states: Sequence[np.ndarray]) -> Callable[[list[tuple[Any, int]]], dict[str, Any]]:
    """Makes the function that pads rows and their states.

    Args:
      collate: pads rows.
      states: those of all rows, by their number.

    Returns:
      A list of b pairs (row, its number) -> what collate gives, and "hidden" [b,L,D], zero at padding.
    """

    def collate_states(items: list[tuple[Any, int]]) -> dict[str, Any]:
        arrays = collate([row for row, _ in items])
        first = states[items[0][1]]
        hidden = np.zeros((*arrays["tokens"].shape, first.shape[-1]), first.dtype)
        for b, (_, i) in enumerate(items):
            hidden[b, : len(states[i])] = states[i]
        return {**arrays, "hidden": hidden}

    return collate_states


def _mapped(path: pathlib.Path, rows: int, dtype: Any) -> np.ndarray:
    """The states of a shard, on disk. ValueError for a damaged file, and for NaN and infinities."""
    _io.check_digest(path, then="remove that file")
    found: np.ndarray | None = None
    with contextlib.suppress(ValueError, EOFError, OSError):
        found = np.load(path, mmap_mode="r").view(dtype)
    if found is None or len(found) != rows:
        length = "a damaged file" if found is None else len(found)
        raise ValueError(f"states: expected those of {rows} tokens, found {length} in {path}; remove that file")
    if not _finite(found):
        raise ValueError(f"states: expected finite numbers, found others in {path}; remove that file")
    return found


def _finite(states: np.ndarray) -> bool:
    """Whether all numbers are, part by part: the whole of a shard need not be in memory."""
    return all(np.isfinite(part.astype(np.float32)).all() for part in np.array_split(states, len(states) // 4096 + 1))


def _write(
    path: pathlib.Path,
    read: Callable[[Params, Any, Any], jax.Array],
    params: Params,
    rows: list[Any],
    collate: Collate,
    size: int,
) -> None:
    """A shard: the states of all real tokens, row after row; read(params, tokens, mask) gives those of a batch."""
    parts = []
    for part in iterate(rows, size):
        batch = collate(part + [part[-1]] * (size - len(part)))
        hidden = np.asarray(read(params, batch["tokens"], batch["mask"]))
        parts.append(hidden[: len(part)][batch["mask"][: len(part)]])
    whole = np.concatenate(parts)
    if not _finite(whole):
        raise ValueError(
            f"states: expected finite numbers of the base, found others for rows of {path.name}; its weights are not "
            "finite, or its type is too narrow for them (--dtype)"
        )
    with _io.whole_file(path) as sink:  # as plain bits: numpy's format does not know bfloat16
        np.save(sink, whole.view(f"u{whole.itemsize}"))
        sink.flush()
        _io.write_text(_io.sidecar(path), _io.file_digest(_io.temporary_name(path)) + "\n")


def _digest(params: Params) -> str:
    """A short hash of the weights."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

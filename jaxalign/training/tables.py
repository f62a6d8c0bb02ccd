"""Calibration tables: the sorted rewards of K base samples for each prompt of a set, and what they were made with.

A table is only right for the model, tokenizer, template, temperature, length and prompts that made it, so all of them
are stored with it and compared when it is read.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign import _hosts, _io, models, rewards

REWARDS, ABOUT = "table.npz", "table.json"
AGAIN = "remove both its table.npz and summary.json, and repeat the command that made it"
MEANING = {
    "base": "the model whose samples it ranks against",
    "reward": "the reward",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "temperature": "the temperature",
    "dtype": "the type that models and rewards computed in",
    "max_new_tokens": "the longest response",
    "prompts": "the set of prompts",
}


class Table(NamedTuple):
    """A calibration table."""

    reward: np.ndarray
    """Rewards [prompts,K] of the base's samples, ascending."""
    about: dict[str, Any]
    """What it was made with: each key of `MEANING`, K as "samples", and the seed."""


def made_with(
    base: str,
    reward: str,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    dtype: str,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Says what a table depends on. Weights count, names of folders do not.

    Args:
      base: folder of the model whose samples are ranked against.
      reward: as `rewards.parse_reward` reads it; MODULE:FUNCTION counts by its name and the text of its source files.
      tokenizer: the model's; its vocabulary and template count.
      prompts: token ids of all prompts.
      max_new_tokens: limit of a response [tokens].
      dtype: type that models and rewards compute in.
      temperature: of the samples.

    Returns:
      A value for each key of `MEANING`.
    """
    terms = sorted((_source_digest(name), weight) for weight, name in rewards.parse_reward(reward))
    return {
        "base": folder_digest(base),
        "reward": " + ".join(name if weight == 1 else f"{weight!r} * {name}" for name, weight in terms),
        "tokenizer": _digest(json.dumps(sorted(tokenizer.get_vocab().items())).encode()),
        "template": _digest(str(getattr(tokenizer, "chat_template", None)).encode()),
        "temperature": float(temperature),
        "dtype": dtype,
        "max_new_tokens": int(max_new_tokens),
        "prompts": _digest(json.dumps([list(map(int, p)) for p in prompts]).encode()),
    }


def write(folder: pathlib.Path, table: Table) -> None:
    """Writes table.npz, then table.json: where the second is, the table is whole. Of several processes the first does.

    Args:
      folder: the run folder.
      table: rewards in any order, which are sorted here, and what they were made with.

    Raises:
      ValueError: fewer than 2 samples a prompt, a reward that is not finite.
    """
    reward = np.sort(np.asarray(table.reward), axis=-1)
    if reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(f"samples: expected at least 2 for each prompt, found rewards of shape {reward.shape}")
    bad = np.flatnonzero(~np.isfinite(reward).all(axis=1)).tolist()
    if bad:
        raise ValueError(f"reward: expected finite numbers, found others for prompts {bad}")
    with _hosts.together():
        if _hosts.is_first():
            _io.write_arrays(folder / REWARDS, {"reward": reward})
    _io.write_json(folder / ABOUT, table.about | {"samples": reward.shape[1]})


def read_about(folder: str | pathlib.Path) -> dict[str, Any]:
    """What the table of a folder was made with. ValueError for a folder without a table, or with a damaged one."""
    path = pathlib.Path(folder) / ABOUT
    if not path.is_file():
        raise ValueError(f"calibration: expected a folder of train.calibrate, found no {ABOUT} in {folder}")
    found: dict[str, Any] = _io.read_json(path, then=AGAIN)
    return found


def read(folder: str | pathlib.Path, expected: dict[str, Any], *, rows: int) -> Table:
    """Reads the table of a folder.

    Args:
      folder: of train.calibrate.
      expected: what it has to be made with, as `made_with` says.
      rows: number of prompts.

    Returns:
      The table.

    Raises:
      ValueError: no table there, or one made otherwise; it names the first thing that differs. A damaged table, one of
        other rows or columns, or of rewards that are not finite or not in ascending order.
    """
    path = pathlib.Path(folder)
    about = read_about(path)
    for name, meaning in MEANING.items():
        if about.get(name) != expected[name]:
            raise ValueError(
                f"calibration: expected a table of the same {name} ({meaning}), {expected[name]}, found one of "
                f"{about.get(name)} in {path}"
            )
    if not (path / REWARDS).is_file():
        raise ValueError(f"calibration: expected {REWARDS} beside {ABOUT}, found none in {path}; {AGAIN}")
    reward = _io.read_arrays(path / REWARDS, ("reward",), then=AGAIN)["reward"]
    shape, where = (rows, about.get("samples")), f"in {path / REWARDS}; {AGAIN}"
    if reward.shape != shape:
        raise ValueError(
            f"calibration: expected rewards of shape {shape}, prompts and samples, found {reward.shape} {where}"
        )
    if reward.dtype.kind != "f":
        raise ValueError(f"calibration: expected rewards of a float type, found {reward.dtype} {where}")
    for wrong, words in ((~np.isfinite(reward), "finite rewards"), (np.diff(reward) < 0, "rewards in ascending order")):
        if (bad := np.flatnonzero(wrong.any(axis=1))).size:
            raise ValueError(f"calibration: expected {words}, found others in row {bad[0]} {where}")
    return Table(reward, about)


def folder_digest(folder: str | pathlib.Path) -> str:
    """Gives a short hash of a model folder's config and weights, of an adapter's and its base's; the name itself where
    there is no such folder."""
    folders = [pathlib.Path(name) for name in models.source_folders(str(folder))]
    if not folders[0].is_dir():
        return str(folder)
    digest = hashlib.blake2b(digest_size=8)
    names = ("config.json", "adapter_config.json")
    for file in [f for p in folders for f in sorted([*p.glob("*.safetensors"), *(p / name for name in names)])]:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as source:
                while part := source.read(1 << 24):
                    digest.update(part)
    return digest.hexdigest()


def _source_digest(source: str) -> str:
    """What a term of a reward is, in short: the hash of a folder, or a program's name and the hash of its files."""
    if not rewards.is_program(source):
        return folder_digest(source)
    files = [pathlib.Path(file).read_bytes() for file in rewards.program_files(source)]
    return " ".join([source, *map(_digest, files)])


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=8).hexdigest()

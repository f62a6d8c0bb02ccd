"""Where a model comes from: a folder, a hub name, or an adapter's folder, which names the base that it changes.

ADAPTER_DIR@BASE_DIR names an adapter and the base in place of the one that its adapter_config.json names.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import NamedTuple, TypeAlias

from jaxalign._files import printed
from jaxalign.models.config import Config, Head
from jaxalign.models.hf.config import BOUND, read_pooling
from jaxalign.models.hf.fields import is_integer
from jaxalign.models.hf.files import local_folder, naming_file, read_json, tell
from jaxalign.models.hf.peft import AdapterFile, read_adapter
from jaxalign.models.hf.tensors import Edits
from jaxalign.types import Array

ADAPTER = "adapter_config.json"

Chain: TypeAlias = tuple[pathlib.Path, ...]


class Source(NamedTuple):
    """The folders that a model is read from."""

    base: pathlib.Path
    """The folder of config.json and of the weights."""
    adapters: tuple[pathlib.Path, ...]
    """Folders of adapters, in the order in which they are merged; () for a whole model."""

    @property
    def folders(self) -> tuple[pathlib.Path, ...]:
        """All folders, the one that was named first."""
        return (*self.adapters[::-1], self.base)


def split_source(text: str) -> tuple[str, str]:
    """Reads a model's place, "DIR", "owner/model" or "ADAPTER_DIR@BASE_DIR".

    Args:
      text: as given. A folder whose own name holds an @ is taken as it is.

    Returns:
      (the folder or hub name, the base that is to replace an adapter's own; "" for none).
    """
    if pathlib.Path(text).expanduser().exists():
        return text, ""
    signs = [i for i, sign in enumerate(text) if sign == "@"]
    for i in signs:
        if pathlib.Path(text[:i]).expanduser().is_dir():
            return text[:i], text[i + 1 :]
    return (text[: signs[0]], text[signs[0] + 1 :]) if signs else (text, "")


def find_source(path: str | pathlib.Path, *, base: str | pathlib.Path | None = None) -> Source:
    """Finds the folders of a model.

    Args:
      path: as `split_source` reads it.
      base: in place of the base that an adapter names.

    Returns:
      The base and the adapters on it. An adapter's base may itself be an adapter's folder.

    Raises:
      ValueError: no such folder; a base beside a whole model; an adapter that names no base, or one that is not there;
        a folder that holds both an adapter and a whole model; adapters that name each other.
    """
    found = _chain(str(path), None if base is None else str(base), revision=None, seen=())
    return Source(found[-1], found[-2::-1])


def source_folders(name: str) -> tuple[str, ...]:
    """The folders on this machine that a model is read from, by which a run notices that they have changed.

    Args:
      name: as `find_source` reads it; what is neither an adapter's folder nor ADAPTER_DIR@BASE_DIR is given back.

    Returns:
      Their paths, an adapter's before its base's.
    """
    folder = pathlib.Path(split_source(name)[0] or name).expanduser()
    if not (folder / ADAPTER).exists():
        return (name,)
    return tuple(str(path) for path in find_source(name).folders)


def _holds_model(folder: pathlib.Path) -> bool:
    return (folder / "config.json").exists() or (folder / ADAPTER).exists()


def _chain(name: str, base: str | None, *, revision: str | None, seen: tuple[pathlib.Path, ...]) -> Chain:
    """The folders from the one that is named to the whole model at the end."""
    text, own = split_source(name)
    if own and base:
        raise ValueError(f"base: expected one base, found {own!r} in {name!r} and {base!r}")
    folder, base = local_folder(text, revision=revision), base or own or None
    if not (folder / ADAPTER).exists():
        if base is not None:
            raise ValueError(
                f"base: expected with an adapter's folder, found {base!r} beside a whole model in {folder}"
            )
        return (folder,)
    if any((folder / weights).exists() for weights in ("model.safetensors", "model.safetensors.index.json")):
        raise ValueError(f"path: expected a model or an adapter, found the weights of both in {folder}")
    if folder.resolve() in seen:
        raise ValueError(f"base_model_name_or_path: expected a whole model at the end, found {folder} again")
    seen = (*seen, folder.resolve())
    if base is not None:
        return (folder, *_chain(base, None, revision=None, seen=seen))
    values = read_json(folder / ADAPTER)
    named, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"base_model_name_or_path: expected a base in {folder / ADAPTER}, found {named!r}; name it as "
            f"{folder}@BASE_DIR or with base="
        )
    if any(len(part.encode("utf-8", "replace")) > 255 for part in named.split("/")):
        raise ValueError(f"base_model_name_or_path: expected a base in {folder / ADAPTER}, found {printed(named)}")
    # From the working directory first, as peft does, but not where another thing of that name happens to lie.
    if not _holds_model(pathlib.Path(split_source(named)[0]).expanduser()) and _holds_model(folder / named):
        return (folder, *_chain(str(folder / named), None, revision=None, seen=seen))
    try:
        local_folder(split_source(named)[0], revision=revision)
    except ValueError as error:
        raise ValueError(
            f"base_model_name_or_path: expected the folder of a model or a hub name in {folder / ADAPTER}, found "
            f"{named!r}, which is no folder from the working directory nor from the adapter's folder; name the base as "
            f"{folder}@BASE_DIR or with base="
        ) from error
    return (folder, *_chain(named, None, revision=revision, seen=seen))


def merge_plan(source: Source, config: Config, *, check_finite: bool = True) -> tuple[Config, Edits]:
    """What the adapters of a source make of its base: the config of the whole model, and the edits of its tensors.

    A score among an adapter's saved modules makes a reward model of a language model, as a …ForSequenceClassification
    class of transformers does it; it is not read at the pad id of the tokenizer in the adapter's folder, where one is
    saved there, else of the base. An lm_head unties tied embeddings. check_finite: as in `folders.load`.
    """
    products: dict[str, list[tuple[Array, Array, float]]] = {}
    replaced: dict[str, Array] = {}
    for folder in source.adapters:
        with naming_file(folder):
            found = read_adapter(folder, config, check_finite=check_finite)
            config = _config_with(config, found, folder)
        for key, product in found.products.items():
            products.setdefault(key, []).append(product)
        replaced |= found.saved
    return config, Edits(products, replaced)


def _config_with(config: Config, adapter: AdapterFile, folder: pathlib.Path) -> Config:
    """The config of a model after an adapter's saved modules have taken their places."""
    task, labels = adapter.config.get("task_type"), adapter.saved.get("score.weight")
    if task not in (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"):
        raise ValueError(f"task_type: expected 'CAUSAL_LM' or 'SEQ_CLS' in {folder / ADAPTER}, found {task!r}")
    if config.head is None and labels is not None:
        bound, pooling = adapter.config.get(BOUND), read_pooling(adapter.config)
        head = Head("reward", num_labels=labels.shape[0], bound=bound, pooling=pooling)
        config = dataclasses.replace(config, head=head)
    pad = _pad_id(folder) if labels is not None else None
    if pad is not None and pad != config.pad_id:
        tell(f"{folder}: the pad id {pad} of the adapter's tokenizer takes the place of the base's {config.pad_id}")
        config = dataclasses.replace(config, pad_id=pad)
    if task == "SEQ_CLS" and config.head is None:
        raise ValueError(
            f"modules_to_save: expected a score in {folder}, whose task_type is 'SEQ_CLS', or in its base, found none"
        )
    if "lm_head.weight" in adapter.saved and config.tie_embeddings:
        config = dataclasses.replace(config, tie_embeddings=False)
    return config


def _pad_id(folder: pathlib.Path) -> int | None:
    """The pad id of the tokenizer beside an adapter, None without one: trainers set the model's to it, and a score is
    not read at it."""
    if not all((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    token = read_json(folder / "tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    values = read_json(folder / "tokenizer.json")
    model, added = values.get("model"), values.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    for one in added if isinstance(added, list) else []:
        if isinstance(one, dict) and isinstance(one.get("content"), str):
            ids[one["content"]] = one.get("id")
    found = ids.get(token) if isinstance(token, str) else None
    return found if is_integer(found) else None

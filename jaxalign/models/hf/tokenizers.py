"""The tokenizer of a model's folder, in any of the forms that people have it; no code from the folder is run."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxalign._files import check_regular, printed
from jaxalign._transformers import transformers
from jaxalign.models.hf.fields import is_integer
from jaxalign.models.hf.files import local_folder, read_json, tell
from jaxalign.models.hf.sources import find_source, split_source

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder holds one of these, or it has no tokenizer."""

TEMPLATES = "additional_chat_templates"
"""The folder of further templates."""

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")
"""Names of transformers' class that reads any tokenizer.json."""

ROLES = ("bos_token", "eos_token")
"""Special tokens that config.json names by id; a tokenizer without files of its own settings takes them from there."""


def tokenizer(path: str | pathlib.Path, *, chat_template: str = "") -> Any:
    """Loads the tokenizer of a folder.

    tokenizer.json is enough, and so is tokenizer.model (sentencepiece, an extra): without tokenizer_config.json it is
    read as the sentencepiece model itself, with its BOS in front of each text, as Llama's and Mistral's have it.
    Without settings of its own a tokenizer has the BOS and EOS that generation_config.json or config.json name by id.
    The template is that of chat_template.jinja or of tokenizer_config.json.

    Args:
      path: a folder with tokenizer files, or "owner/model" on the hub. An adapter's folder without tokenizer files,
        also as "ADAPTER_DIR@BASE_DIR", has its base's.
      chat_template: the name of one of several chat templates (a list in tokenizer_config.json, or the files of
        additional_chat_templates/); "" takes the one that is named "default".

    Returns:
      A tokenizer of transformers with one chat template, or none.

    Raises:
      ValueError: no such folder, or one without tokenizer files; a tokenizer that needs code from the folder
        (auto_map); files that cannot be read; packages that are missing for them; a chat template that is not there,
        or several without a default.
    """
    folder = local_folder(split_source(str(path))[0])
    if not _has_files(folder):
        folder = next((place for place in find_source(path).folders if _has_files(place)), folder)
    if not _has_files(folder):
        raise ValueError(f"tokenizer: expected tokenizer files in the folder, found none in {folder}")
    for path in _all_files(folder):
        check_regular(path)
    loaded = _read(folder)
    loaded.chat_template = _one_template(loaded.chat_template, chat_template, folder)
    return loaded


def _all_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """What transformers may open for a tokenizer."""
    ends = {".json", ".model", ".jinja", ".txt"}
    return [path for place in (folder, folder / TEMPLATES) for path in place.glob("*") if path.suffix in ends]


def _has_files(folder: pathlib.Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def _read(folder: pathlib.Path) -> Any:
    alone = [name for name in FILES if (folder / name).exists()] == ["tokenizer.model"]
    if alone:
        absent = [name for name in ("sentencepiece", "google.protobuf") if not _is_there(name)]
        if absent:
            raise ValueError(
                f"tokenizer.model: expected the packages that read it (pip install 'jaxalign[sentencepiece]'), found "
                f"no {' and no '.join(absent)} for {folder / 'tokenizer.model'}"
            )
    library = transformers()
    reader = library.PreTrainedTokenizerFast if _is_generic(folder) else library.AutoTokenizer
    try:
        loaded = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not (folder / "tokenizer_config.json").exists():
            if alone:
                _write_bos(loaded, folder)
            _name_specials(loaded, folder)
        _tell_differences(loaded, folder)
    except UserWarning:
        raise
    except BaseException as error:  # of transformers, of tokenizers, or of whatever a file's reader raises
        # The reader of tokenizer.json ends some files by a panic, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        for name in ("tokenizer_config.json", "config.json"):
            code = read_json(folder / name).get("auto_map") if (folder / name).exists() else None
            if code:
                raise ValueError(
                    f"auto_map: expected a tokenizer without code of its own, found {code!r} in {folder / name}; code "
                    "from a folder is not run"
                ) from error
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"tokenizer: expected files that can be read in {folder}, found: {what[0]:.500}") from error
    return loaded


def _is_generic(folder: pathlib.Path) -> bool:
    """Whether tokenizer.json alone says what the tokenizer does: no class of a family is named.

    AutoTokenizer goes by the model's family then, and builds that family's tokenizer around the vocabulary (Qwen2's
    parts words by its own rule, whatever tokenizer.json says), so that other ids come out.
    """
    if not (folder / "tokenizer.json").exists():
        return False
    settings = folder / "tokenizer_config.json"
    values = read_json(settings) if settings.exists() else {}
    return values.get("tokenizer_class") in (None, *GENERIC) and "auto_map" not in values


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a package above it is missing, or it is blocked
        return False


def _write_bos(loaded: Any, folder: pathlib.Path) -> None:
    """Puts the BOS of a sentencepiece model in front of each text: the model itself does not say that it stands there,
    and all models of its families were trained so."""
    if loaded.bos_token_id is None:
        return
    import tokenizers  # needed where text comes in

    bos = str(loaded.bos_token)
    loaded.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, loaded.bos_token_id)]
    )
    tell(f"{folder}: tokenizer.model alone: {bos} is put in front of each text, as Llama's and Mistral's have it")


def _name_specials(loaded: Any, folder: pathlib.Path) -> None:
    """Gives a tokenizer the BOS and EOS that it lacks and that the model's files name by id."""
    named = []
    for role in ROLES:
        if getattr(loaded, role) is not None:
            continue
        for name in ("generation_config.json", "config.json"):
            found = read_json(folder / name).get(f"{role}_id") if (folder / name).exists() else None
            first = found[0] if isinstance(found, list) and found else found
            # Of ids that are none: transformers' vocabulary counts in unsigned 32 bits.
            token = loaded.convert_ids_to_tokens(first) if is_integer(first) and 0 <= first < len(loaded) else None
            if token is not None:
                setattr(loaded, role, token)
                named.append(f"{role} {token!r} of {name}")
                break
    if named:
        tell(f"{folder}: without tokenizer_config.json the tokenizer has the {' and the '.join(named)}")


def _tell_differences(loaded: Any, folder: pathlib.Path) -> None:
    """Tells in one line which special ids of the tokenizer are not those of the model's files."""
    values: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            values |= {role: i for role, i in read_json(folder / name).items() if i is not None}
    found = []
    for role, kind in (("bos_token", "BOS"), ("eos_token", "EOS"), ("pad_token", "pad")):
        own, given = getattr(loaded, f"{role}_id", None), values.get(f"{role}_id")
        known = given if isinstance(given, list) else [given]
        if own is not None and given is not None and own not in known:
            found.append(f"{kind} {getattr(loaded, role)!r} ({own}), where the model's files have {given}")
    if found:
        tell(f"{folder}: the tokenizer has {'; '.join(found)}")


def _one_template(found: Any, wanted: str, folder: pathlib.Path) -> str | None:
    """The template that is used, of one or several."""
    if not isinstance(found, Mapping):
        if wanted:
            raise ValueError(f"chat_template: expected several named templates in {folder}, found no {wanted!r}")
        if found is not None and not isinstance(found, str):
            raise ValueError(f"chat_template: expected a text or named texts in {folder}, found {printed(found)}")
        return found
    names = sorted(found)
    name = wanted or "default"
    if name not in found:
        how = "" if wanted else "; name one by chat_template= (--chat-template)"
        raise ValueError(f"chat_template: expected one of {names} in {folder}, found no {name!r}{how}")
    if not wanted and len(names) > 1:
        tell(f"{folder}: of the chat templates {names} the one named 'default' is used")
    if not isinstance(found[name], str):
        raise ValueError(f"chat_template: expected a text under {name!r} in {folder}, found {printed(found[name])}")
    return str(found[name])

"""The tokenizers of folders as people have them: one file alone, several templates, code that is not run."""

from __future__ import annotations

import json
import sys

import jax
import pytest

from jaxalign import models
from jaxalign.data.tokenizers import word_level
from tests import folders_made, token_cases
from tests.conftest import tiny_lm
from tests.folders_made import write

TEXTS = ["hello you", "  hello  you\n\nmat", " cat", "é✓ mat", "Human: hello\n\nAssistant: yes"]
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


def test_tokenizer_json_alone(tmp_path):
    found = models.tokenizer(write(tmp_path, {"tokenizer.json": folders_made.tokenizer_json()}))
    expected = token_cases.byte_level()
    for text in TEXTS:
        assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert found.chat_template is None
    assert found.eos_token is None


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_ends_of_a_model_are_those_of_a_tokenizer_without_settings(name, tmp_path):
    values = models.config_to_hf(tiny_lm(0)[0].config) | {"bos_token_id": 1, "eos_token_id": [4, 2]}
    files = {"tokenizer.json": folders_made.tokenizer_json(), "config.json": {"model_type": "llama"}, name: values}
    with pytest.warns(UserWarning, match=rf"has the bos_token '<s>' of {name} and the eos_token '<\|im_end"):
        found = models.tokenizer(write(tmp_path, files))
    assert (found.eos_token_id, found.bos_token_id) == (4, 1)


def test_a_sentencepiece_model_alone_encodes_as_sentencepiece_does(tmp_path):
    import sentencepiece

    proto = folders_made.sentencepiece_model()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    with pytest.warns(UserWarning, match=r"tokenizer\.model alone: <s> is put in front"):
        found = models.tokenizer(write(tmp_path / "alone", {"tokenizer.model": proto}))
    for text in TEXTS:
        assert found(text)["input_ids"] == [theirs.bos_id(), *theirs.encode(text)]
        assert found(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
        assert found.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    assert (found.bos_token_id, found.eos_token_id) == (theirs.bos_id(), theirs.eos_id())
    found.save_pretrained(tmp_path / "saved")
    again = models.tokenizer(tmp_path / "saved")
    assert [again(text)["input_ids"] for text in TEXTS] == [found(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_a_package_that_is_missing_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"tokenizer\.model: .*jaxalign\[sentencepiece\].*no {package}"):
        models.tokenizer(write(tmp_path, {"tokenizer.model": folders_made.sentencepiece_model()}))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: expected tokenizer files"):
        models.tokenizer(tmp_path)
    for name, content in (("tokenizer.model", b"no model"), ("tokenizer.json", "{}")):
        folder = write(tmp_path / name, {name: content, "tokenizer_config.json": PLAIN})
        with pytest.raises(ValueError, match=rf"^tokenizer: expected files that can be read in .*{folder.name}, found"):
            models.tokenizer(folder)


# Chat templates -------------------------------------------------------------------------------------------------------


def test_a_template_in_a_file_of_its_own_is_read_before_the_one_in_the_settings(tmp_path):
    files = {"tokenizer.json": folders_made.tokenizer_json(), "tokenizer_config.json": PLAIN | {"chat_template": "C"}}
    assert models.tokenizer(write(tmp_path, files)).chat_template == "C"
    assert models.tokenizer(write(tmp_path, {"chat_template.jinja": "J"})).chat_template == "J"


def named(tmp_path, kind, names):
    """Named templates, each its own name in capitals, as a list of the settings or as files."""
    base = {"tokenizer.json": folders_made.tokenizer_json(), "tokenizer_config.json": PLAIN}
    if kind == "list":
        listed = [{"name": name, "template": name.upper()} for name in names]
        base["tokenizer_config.json"] = PLAIN | {"chat_template": listed}
    else:
        for name in names:
            at = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
            base[f"{at}.jinja"] = name.upper()
    return write(tmp_path / kind, base)


@pytest.mark.parametrize("kind", ["list", "files"])
def test_of_several_templates_the_default_or_the_named_one_is_used(kind, tmp_path):
    folder = named(tmp_path, kind, ["rag", "default", "tool_use"])
    with pytest.warns(UserWarning, match=r"\['default', 'rag', 'tool_use'\] the one named 'default' is used"):
        found = models.tokenizer(folder)
    assert found.chat_template == "DEFAULT"
    assert models.tokenizer(folder, chat_template="rag").chat_template == "RAG"
    with pytest.raises(ValueError, match=r"chat_template: expected one of \['default', .*found no 'chat'"):
        models.tokenizer(folder, chat_template="chat")


@pytest.mark.parametrize("kind", ["list", "files"])
def test_several_templates_without_a_default_are_listed(kind, tmp_path):
    folder = named(tmp_path, kind, ["rag", "tool_use"])
    with pytest.raises(ValueError, match=r"chat_template: expected one of \['rag', 'tool_use'\].*chat_template="):
        models.tokenizer(folder)
    assert models.tokenizer(folder, chat_template="tool_use").chat_template == "TOOL_USE"


def test_a_name_where_there_is_one_template_is_refused(tmp_path):
    files = {"tokenizer.json": folders_made.tokenizer_json(), "chat_template.jinja": "J"}
    with pytest.raises(ValueError, match="chat_template: expected several named templates"):
        models.tokenizer(write(tmp_path, files), chat_template="rag")


# Code -----------------------------------------------------------------------------------------------------------------

CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Mine: pass\n"


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}, None),
        ({"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}, None),
        ({}, {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoTokenizer": "mine.Mine"}}),
    ],
)
def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(settings, config, tmp_path, monkeypatch):
    asked = []

    def answer(question=""):
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    files = {"vocab.json": {"a": 0}, "merges.txt": "", "mine.py": CODE, "tokenizer_config.json": settings}
    folder = write(tmp_path, files | ({} if config is None else {"config.json": config}))
    with pytest.raises(ValueError, match=r"^auto_map: expected a tokenizer without code of its own, found"):
        models.tokenizer(folder)
    assert not (folder / "ran").exists()
    assert not asked


def test_code_that_is_not_needed_is_passed_over(tmp_path):
    settings = PLAIN | {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    files = {"tokenizer.json": folders_made.tokenizer_json(), "mine.py": CODE, "tokenizer_config.json": settings}
    assert models.tokenizer(write(tmp_path, files))("hello")["input_ids"]
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_is_refused(tmp_path):
    lm, params = tiny_lm(0)
    models.save(tmp_path / "model", lm, params)
    values = json.loads((tmp_path / "model/config.json").read_text())
    for changed in ({"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, {"auto_map": {"AutoConfig": "mine.Mine"}}):
        write(tmp_path / "model", {"config.json": values | changed | {"model_type": "llama"}, "mine.py": CODE})
        if "AutoConfig" in changed["auto_map"]:
            models.load(tmp_path / "model")  # a config of a known family is read without its code
            continue
        with pytest.raises(ValueError, match="auto_map: expected a model without code"):
            models.load(tmp_path / "model")
    write(tmp_path / "model", {"config.json": values | {"auto_map": {"AutoConfig": "mine.Mine"}, "model_type": "mine"}})
    with pytest.raises(ValueError, match="auto_map: expected a model without code"):
        models.load(tmp_path / "model")


def test_an_adapters_folder_without_a_tokenizer_has_its_bases(tmp_path):
    lm, params = tiny_lm(0, eos_ids=(2,))
    models.save(tmp_path / "base", lm, params, tokenizer=token_cases.byte_level())
    spec = models.Lora(2)
    adapter = models.lora.init(jax.random.key(0), lm, spec)
    models.save_adapter(tmp_path / "adapter", lm, spec, adapter, base="gone/for/good")
    found = models.tokenizer(f"{tmp_path / 'adapter'}@{tmp_path / 'base'}")
    assert found("hello")["input_ids"] == token_cases.byte_level()("hello")["input_ids"]
    own = {"tokenizer.json": folders_made.tokenizer_json(), "tokenizer_config.json": PLAIN}
    assert models.tokenizer(write(tmp_path / "adapter", own)).eos_token == "</s>"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("settings", [True, False])
def test_tokenizer_json_says_what_the_tokenizer_does_whatever_the_family(family, settings, tmp_path):
    """A tokenizer of whole words in the folder of each family: transformers would build Qwen2's around its words."""
    words = word_level(["cat", "dog"])
    words.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    if not settings:
        (tmp_path / "tokenizer_config.json").unlink()
    assert models.tokenizer(tmp_path)("cat dog")["input_ids"] == [3, 4]

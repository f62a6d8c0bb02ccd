"""Folders with values that were once taken in silence, or whose reader waited for ever: named, at once."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import data, models
from jaxalign.evaluation.report import write_report
from jaxalign.models.hf import adapter_fields, folders
from tests.fuzz.model_folders import ADAPTER, SMALL, write_model
from tests.test_report import make_run


@contextlib.contextmanager
def at_once(seconds: int = 10):
    """Ends what waits for ever."""

    def late(number, frame):
        raise AssertionError(f"expected an answer within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder as another library writes it."""
    path = tmp_path_factory.mktemp("folders") / "model"
    write_model(path)
    save_file(load_file(path / "model.safetensors"), path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def copy(folder, tmp_path):
    os.makedirs(tmp_path / "model")
    for file in folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model"


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number > 0, found nan"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: expected a finite number > 0, found -1"),
        ({"rope_theta": -1, "rope_parameters": None}, "rope_theta: expected a finite number > 0, found -1"),
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta: expected a finite number > 0, found 0"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "rope_parameters.factor: expected a finite number > 0, found 0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": "false"}},
            "truncate: expected true or false, found",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, found 'false'"),
        ({"attention_bias": "no"}, "attention_bias: expected true or false, found 'no'"),
        ({"eos_token_id": 999}, "eos_token_id: expected ids below vocab_size, 11, found 999"),
        ({"eos_token_id": [0, -5]}, "eos_token_id: expected ids below vocab_size, 11, found [0, -5]"),
        ({"eos_token_id": "0"}, "eos_token_id: expected ids below vocab_size, 11, found '0'"),
        ({"eos_token_id": 1.5}, "eos_token_id: expected ids below vocab_size, 11, found 1.5"),
        ({"eos_token_id": True}, "eos_token_id: expected ids below vocab_size, 11, found True"),
        ({"bos_token_id": "x"}, "bos_token_id: expected an integer from -1 to"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: expected an integer from 1 to 10000, found 1000000000000"),
        ({"num_hidden_layers": 1e12}, "num_hidden_layers: expected an integer from 1 to 10000, found 1000000000000.0"),
        ({"vocab_size": 10**12}, "vocab_size: expected an integer from 1 to 2147483647, found 1000000000000"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: expected an integer from 1"),
        ({"head_dim": 0}, "head_dim: expected an integer from 1"),
        ({"num_labels": 0}, "num_labels: expected an integer from 1"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "num_labels": 2**31 - 1},
            "num_labels: expected at most 1000000, found 2.14748e+09",
        ),
        ({"jaxalign_head": {"kind": "reward", "num_labels": 2**31 - 1}}, "num_labels: expected at most 1000000"),
        (
            {"jaxalign_head": {"kind": "value", "hidden_size": 4, "num_hidden": 10**9}},
            "num_hidden: expected at most 10000",
        ),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_experts: expected at most 1000000 of all layers"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: expected a list of names, found 'LlamaForCausalLM'"),
    ],
)
def test_a_field_that_is_none_of_a_model_is_named_with_its_file(fields, named, copy):
    change(copy / "config.json", **fields)
    with at_once(), pytest.raises(ValueError, match=f"{re.escape(named)}.* in .*/model/config.json$"):
        models.read_config(copy)


def test_a_familys_own_end_is_taken_in_a_small_vocabulary():
    values = {k: v for k, v in SMALL.items() if k != "eos_token_id"} | {"model_type": "olmo2"}
    config = models.config_from_hf(values)
    assert config.eos_ids == (50279,)
    assert models.config_from_hf(models.config_to_hf(config)) == config


def test_an_end_of_generation_config_outside_the_vocabulary_is_named(copy):
    change(copy / "generation_config.json", eos_token_id=[0, 999])
    with pytest.raises(
        ValueError, match=r"eos_token_id: .*below vocab_size, 11, found \[0, 999\] in .*/generation_config"
    ):
        models.read_config(copy)


def test_sizes_of_a_config_have_an_upper_end():
    config = models.config_from_hf(SMALL)
    for name in ("num_layers", "hidden_size"):
        with pytest.raises(ValueError, match=rf"{name}: expected at most \d+, found 1e\+12"):
            type(config)(**{**vars(config), name: 10**12})


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 10_000, b"[1]"])
def test_a_config_that_is_no_object_in_utf_8(prefix, copy):
    content = (copy / "config.json").read_bytes()
    (copy / "config.json").write_bytes(prefix + content)
    if prefix == b"\xef\xbb\xbf":  # some editors write it, and it says no more than that this is UTF-8
        assert models.read_config(copy) == models.config_from_hf(json.loads(content))
        return
    with pytest.raises(ValueError, match=r"^config\.json: expected .*, found .* in .*/model/config\.json$"):
        models.read_config(copy)


# Weights --------------------------------------------------------------------------------------------------------------

KEY = "model.layers.0.mlp.down_proj.weight"


def rewrite(file, **arrays):
    save_file(load_file(file) | arrays, file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weights_that_are_not_finite_are_named_by_file_and_tensor(value, dtype, copy):
    file = copy / "model.safetensors"
    weight = load_file(file)[KEY].copy()
    weight[1, 2] = value
    rewrite(file, **{KEY: weight.astype(jax.numpy.dtype(dtype))})
    with pytest.raises(
        ValueError, match=rf"^{KEY}: expected finite weights, found 1 .* in .*/model\.safetensors; check_f"
    ):
        models.load(copy)
    found = models.load(copy, check_finite=False)[1]
    assert not np.isfinite(found["transformer"]["layer_0"]["down"]["kernel"]).all()


def test_weights_that_are_read_one_at_a_time_are_checked_as_others_are(copy):
    weight = load_file(copy / "model.safetensors")[KEY].copy()
    weight[1, 2] = np.nan
    rewrite(copy / "model.safetensors", **{KEY: weight})

    def kernel(**options):
        with folders.stored(copy, **options) as (_, arrays):
            return arrays["transformer"]["layer_0"]["down"]["kernel"].part(None)

    for options in ({}, {"check_finite": True}):
        with pytest.raises(
            ValueError, match=rf"^{KEY}: expected finite weights, found 1 .*model\.safetensors; check_f"
        ):
            kernel(**options)
    assert np.isnan(kernel(check_finite=False)).sum() == 1


def test_weights_that_this_library_wrote_are_checked_as_others_are(tmp_path):
    lm = models.LanguageModel(models.config_from_hf(SMALL))
    params = lm.init(jax.random.key(0))
    params["transformer"]["embedding"] = params["transformer"]["embedding"].at[3, 1].set(np.nan)
    models.save(tmp_path / "model", lm, params)
    for options in ({}, {"check_finite": True}):
        with pytest.raises(
            ValueError, match=r"embed_tokens\.weight: expected finite weights, found 1 .*model\.safetensors"
        ):
            models.load(tmp_path / "model", **options)
    assert np.isnan(models.load(tmp_path / "model", check_finite=False)[1]["transformer"]["embedding"][3, 1])


def test_weights_of_integers_are_named(copy):
    rewrite(copy / "model.safetensors", **{KEY: np.ones((8, 12), np.int32)})
    with pytest.raises(
        ValueError, match=rf"^{KEY}: expected weights of a type of .*, found I32 in .*model\.safetensors"
    ):
        models.load(copy)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../model/model.safetensors", "a/model.safetensors", "..", "", 5, None, "model.bin"]
)
def test_an_index_names_files_beside_it_alone(name, copy):
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {KEY: name}}))
    with pytest.raises(
        ValueError, match=r"^model\.safetensors\.index\.json: expected names of safetensors files in the f"
    ):
        models.load(copy)


# Pipes, and time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "adapter_config.json"])
def test_a_pipe_in_a_models_folder_is_named_at_once(name, copy):
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    if name == "adapter_config.json":
        (copy / "model.safetensors").unlink()
    with at_once(), pytest.raises(ValueError, match=rf"^{re.escape(name)}: expected a file, found a pipe at .*{name}"):
        models.load(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_a_pipe_among_a_tokenizers_files_is_named_at_once(name, tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with at_once(), pytest.raises(ValueError, match=r"expected a file, found a pipe at"):
        models.tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.json.gz"])
def test_a_pipe_in_the_place_of_data_is_named_at_once(name, tmp_path):
    os.mkfifo(tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        with at_once(), pytest.raises(ValueError, match=r"^data: expected .*found"):
            data.read_pairs(source)


@pytest.mark.parametrize("name", ["responses.jsonl", "summary.json", "config.json", "versions.json"])
def test_a_pipe_in_a_run_folder_is_named_at_once(name, tmp_path):
    place = make_run(tmp_path / "run") / "decode/base" / name
    place.unlink()
    os.mkfifo(place)
    with at_once(), pytest.raises(ValueError, match=rf"^{name}: expected a file, found a pipe at .*{name}"):
        write_report([tmp_path / "run"], tmp_path / "page.html")


def adapter_of(folder, a=1.0, b=1.0, **fields):
    """An adapter of the model beside it, of one projection."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | fields))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    arrays = {f"{key}A.weight": np.full((2, 8), a, np.float32), f"{key}B.weight": np.full((8, 2), b, np.float32)}
    save_file(arrays, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*x",
        "(q|q)*!",
        ".*.*.*.*.*.*.*!",
        ".?" * 40 + "Z",
        "(?:.{0,3})?" * 20 + "Z",
        "(?:.|m|)" * 40 + "Z",
        "(?i:m|M)(?:a|)" + "(?:o?|[a-z]?)" * 40 + "Z",
        "(?=(?:.?){2})" + ".??" * 40 + "Z",
    ],
)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_a_pattern_whose_time_grows_without_end_is_refused(field, pattern, copy, tmp_path):
    value = {pattern: 2} if field in ("rank_pattern", "alpha_pattern") else pattern
    further = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    adapter = adapter_of(tmp_path / "adapter", **further, **{field: value})
    with at_once(), pytest.raises(ValueError, match=rf"^{field}: expected a regular expression of at most 5 repeats"):
        models.read_config(adapter)


PARTS = r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
NAMES = r"(?:q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj)"


@pytest.mark.parametrize(
    "pattern",
    [
        rf"(?:.*?(?:language|text).*?{PARTS}.*?{NAMES}.*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.{PARTS}\.(?:{NAMES}))",
        r"^(?!.*vision)(?:model\.)?layers\.\d+\.(?:self_attn|mlp)\.\w+_proj|.*\.q_proj",
        r"(?:model\.|layers\.0\.|self_attn\.|q_proj)+",
    ],
)
def test_a_pattern_as_trainers_write_it_is_taken(pattern):
    fields = ADAPTER | {"target_modules": pattern}
    with at_once():
        adapter_fields.check_fields(fields, pathlib.Path("adapter_config.json"))
        assert adapter_fields.targets(fields, "model.layers.0.self_attn.q_proj") is not None


@pytest.mark.parametrize("field", ["rank_pattern", "layers_pattern"])
def test_a_pattern_that_is_none_within_the_expression_that_is_matched_is_named(field, copy, tmp_path):
    for name, pattern in (("first", "(?i)layers"), ("second", r"(layers)(?P<x>)|transformer")):
        value = {pattern: 2} if field == "rank_pattern" else [pattern]
        adapter = adapter_of(tmp_path / name, target_modules=["q_proj"], layers_to_transform=[0], **{field: value})
        if name == "second":
            models.read_config(adapter)
            continue
        with pytest.raises(ValueError, match=rf"^{field}: expected a regular expression in .*adapter_config\.json"):
            models.read_config(adapter)


def test_weights_of_an_adapter_that_are_not_finite_are_named(copy, tmp_path):
    adapter = adapter_of(tmp_path / "adapter", a=np.nan)
    with pytest.raises(
        ValueError, match=r"lora_A\.weight: expected finite weights, found 16 .*adapter_model\.safetensors"
    ):
        models.load(adapter)
    models.load(adapter, check_finite=False)


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_sizes_that_would_fill_any_memory_are_refused_at_once():
    import dataclasses

    from jaxalign import decoding, tree
    from jaxalign.evaluation import options as decoding_options
    from jaxalign.training import options

    process = tree.Tree(vocab_size=4, horizon=3)
    given = {"policy": tree.random(jax.random.key(0), process)[0], "reward": None}
    base, prompts = tree.policy(process), tree.prompts(2)
    with at_once(), pytest.raises(ValueError, match="num_samples: expected at most 1000000, found 10000000"):
        decoding.best_of_n(
            base, lambda *x: x, given, jax.random.key(1), prompts, num_samples=10**7, max_new_tokens=2, eos_ids=(0,)
        )
    with pytest.raises(ValueError, match="batch_size: expected at most 1000000, found 100000000"):
        options.check_optimizer_options(options.OptimizerOptions(batch_size=10**8))
    rollouts = options.RolloutOptions(base="b", prompts="p", reward="r")
    for name in ("samples", "max_new_tokens", "shard", "decode_batch"):
        with pytest.raises(ValueError, match=f"{name}: expected at most 1000000, found 10000000"):
            options.check_rollout_options(dataclasses.replace(rollouts, **{name: 10**7}))
    for name in ("batch_size", "num_samples", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{name}: expected at most 1000000, found 100000000"):
            decoding_options.check_options(
                decoding_options.DecodeOptions(model="m", prompts="p", out="o", **{name: 10**8})
            )


LONG = "9" * 5000
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LONG_VALUES = {
    "score": {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": LONG + "x", "score_rejected": 1},
    "label": {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": int("9" * 200)},
    "cut": {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_truncated": LONG},
    "winner": {"conversation_a": CHAT, "conversation_b": CHAT, "winner": LONG},
    "role": {"messages": [{"role": LONG, "content": "a"}]},
}


@pytest.mark.parametrize("name", LONG_VALUES)
def test_a_value_of_thousands_of_letters_is_named_by_its_first(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(LONG_VALUES[name]) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected .*, found ") as found:
        data.read_examples(path) if name == "role" else data.read_pairs(path)
    assert "99999" in str(found.value)
    assert len(str(found.value)) < 700

"""The readers that are fuzzed: for each a folder of good files, what of them is changed, and how the folder is read."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxalign import _options, data, models, policies
from jaxalign.evaluation.report import write_report
from jaxalign.models.families import FAMILIES
from jaxalign.models.hf import fields, files
from jaxalign.tokens import text_format
from tests import folders_made, token_cases
from tests.fuzz.changes import paths_of

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "eos_token_id": [0],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
HEAD = {"kind": "value", "hidden_size": 3, "distribution": {"support": [0.0, 1.0, 2.0], "mode": "grid", "rank": 2}}
GENERATION = {"eos_token_id": [0], "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "num_beams": 1}
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {},
    "alpha_pattern": {"q_proj": 3},
    "base_model_name_or_path": "../model",
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader that is fuzzed."""

    make: Callable[[pathlib.Path], None]
    """Writes the good files into a folder."""
    paths: dict[str, list[list[Any]]]
    """File -> the paths of the fields that are changed; [] where only bytes are."""
    read: Callable[[pathlib.Path], object]
    """Reads the folder."""


def write_model(folder: pathlib.Path, config: dict[str, Any] = SMALL) -> None:
    lm = models.LanguageModel(models.config_from_hf(config))
    models.save(folder, lm, _params(lm), overwrite=True)
    (folder / "config.json").write_text(json.dumps(config))


@functools.cache
def _params(lm: models.LanguageModel) -> Any:
    import jax

    return lm.init(jax.random.key(0))


def _config(folder: pathlib.Path) -> None:
    folders_made.write(folder, {"config.json": SMALL})


def _families(folder: pathlib.Path) -> None:
    for name in FAMILIES:
        own = FAMILIES[name].names
        values = {own.get(k, k): v for k, v in SMALL.items() if own.get(k, k) is not None}
        values |= {"model_type": name, "architectures": None, "rope_parameters": None}
        values[own.get("hidden_size", "hidden_size")] = 16  # a quarter of a head is even
        values.pop("head_dim", None)
        folders_made.write(folder, {f"{name}/config.json": {**dict(FAMILIES[name].defaults), **values}})


def _read_families(folder: pathlib.Path) -> None:
    for name in FAMILIES:
        models.read_config(folder / name)


def _read_generation(folder: pathlib.Path) -> None:
    kept = models.read_config(folder).generation
    with files.naming_file(folder):  # which the text of the fields does not know
        policies.read_generation_config(kept)


def _shards(folder: pathlib.Path) -> None:
    write_model(folder)
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    folders_made.write(folder, {"model.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": names}})


def _adapter(folder: pathlib.Path) -> None:
    write_model(folder / "model")
    place = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{place}A.weight": np.ones((2, 8), np.float32), f"{place}B.weight": np.ones((8, 2), np.float32)}
    folders_made.write(folder, {"adapter/adapter_config.json": ADAPTER})
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    token = {"content": "<pad>", "id": 3}
    folders_made.write(
        folder,
        {"adapter/tokenizer_config.json": {"pad_token": "<pad>"}, "adapter/tokenizer.json": {"added_tokens": [token]}},
    )


def _tokenizer(folder: pathlib.Path) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": token_cases.CHATML}
    files = {"tokenizer.json": folders_made.tokenizer_json(), "tokenizer_config.json": settings, "config.json": SMALL}
    folders_made.write(folder, files | {"generation_config.json": {"eos_token_id": [2]}})


def _bare_tokenizer(folder: pathlib.Path) -> None:
    files = {"tokenizer.json": folders_made.tokenizer_json(), "config.json": SMALL | {"bos_token_id": 1}}
    folders_made.write(folder, files | {"generation_config.json": {"eos_token_id": [2]}})


PAIRS = [
    {"prompt": "Hi", "chosen": "yes", "rejected": "no", "score_chosen": 1.0, "score_rejected": 0.5},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]},
    {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": "c",
        "prompt": "a",
    },
    {"prompt": "p", "response": "r", "helpfulness": 3},
    {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    {"instruction": "i", "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 2}]},
    {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
    {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 2, "score_B": 1},
    {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
]


def _lines(folder: pathlib.Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in PAIRS)
    tables = "prompt,chosen,rejected,score\n" + '"a, b",yes,no,1\nHi,"x\ny",z,2\n'
    folders_made.write(folder, {"rows.jsonl": rows, "array.json": json.dumps(PAIRS[:3]), "table.csv": tables})


def _read_rows(folder: pathlib.Path) -> None:
    for path in folder.glob("*.*"):
        for read in (data.read_pairs, data.read_examples):
            read(path, skip_bad=True, as_messages=True)
            try:
                read(path)
            except ValueError as error:  # of rows of other forms, which a strict reader refuses
                if str(path) not in str(error) or "expected" not in str(error) or len(str(error)) > 3000:
                    raise


def _prompts(folder: pathlib.Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in [{"prompt": "Hi"}, {"messages": PAIRS[1]["messages"]}])
    folders_made.write(folder, {"prompts.jsonl": rows, "prompts.txt": "one\ntwo\n", "prompts.tsv": "prompt\tx\na\tb\n"})


def _read_prompts(folder: pathlib.Path) -> None:
    for path in folder.glob("*.*"):
        data.read_prompts(path)


def _parquet(folder: pathlib.Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(PAIRS[:1] * 3), folder / "rows.parquet")
    import gzip

    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIRS[0]).encode(), mtime=0))


RESPONSE = {
    "method": "base",
    "beta": 0.5,
    "index": 0,
    "prompt": "p",
    "response": "r",
    "tokens": [1, 2],
    "kl": 0.1,
    "kl_kind": "exact",
    "truncated": False,
    "reward": 1.0,
    "gold": 1.0,
    "reference": "x",
}
PIECE = {"method": "base", "beta": 0.5, "index": 0, "reward_before": 0.0, "pieces": [{"text": "a", "candidates": []}]}
RUN = {
    "decode/responses.jsonl": [RESPONSE, RESPONSE | {"index": 1}],
    "decode/tokens.jsonl": [PIECE],
    "sft/summary.json": {"validation_loss": 0.5, "rows": 3},
    "sft/metrics.jsonl": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}],
    "decode/summary.json": [{"method": "base", "beta": 0.5, "tokens_per_second": 5.0}],
    "config.json": {"model": "m", "seed": 1, "method": "base"},
    "versions.json": {"python": "3.11"},
    "timings.json": {"a": 1.0},
}


def _run(folder: pathlib.Path) -> None:
    for name, values in RUN.items():
        lines = "".join(json.dumps(row) + "\n" for row in values)
        folders_made.write(folder, {f"run/{name}": lines if name.endswith(".jsonl") else values})


def _read_run(folder: pathlib.Path) -> None:
    write_report([folder / "run"], folder / "page.html")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a made-up job."""

    config: str = ""
    name: str = "a"
    count: int = 1
    share: float = 0.5
    flag: bool = False
    several: tuple[str, ...] = ()


def _options_file(folder: pathlib.Path) -> None:
    values = {"name": "b", "count": 2, "share": 0.25, "flag": True, "several": ["a"]}
    toml = 'name = "b"\ncount = 2\n[inner]\nx = 1\n'
    folders_made.write(folder, {"options.json": values, "options.toml": toml.partition("[")[0]})


def _read_options(folder: pathlib.Path) -> None:
    for path in folder.glob("options.*"):
        _options.parse(Options, description="", args=["--config", str(path)], prog="x")


def _template(folder: pathlib.Path) -> None:
    _tokenizer(folder)
    folders_made.write(folder, {"chat_template.jinja": token_cases.LLAMA2})


def _render(folder: pathlib.Path) -> None:
    found = models.tokenizer(folder)
    if found.chat_template is not None:
        rows = [data.rows.PromptText(f"{folder}:1", [{"role": "user", "content": "Hi"}])]
        data.encoded.encode_prompts(rows, text_format(found), max_length=None, on_long="error", skip_bad=False)


_TOKENIZER = json.loads(folders_made.tokenizer_json())
_NAMES = (*fields.COUNTS, *fields.COUNTS_FROM_ZERO, *fields.NUMBERS, *fields.FLAGS, *fields.IDS)
_MORE = (
    *_NAMES,
    "num_hidden_layers",
    "layer_types",
    "no_rope_layers",
    "auto_map",
    "id2label",
    "hidden_act",
    "rope_theta",
)
_CONFIG = paths_of(SMALL, further=(*_MORE, "rope_scaling", "rope_parameters", "jaxalign_head", "quantization_config"))
_CONFIG += [
    ["rope_parameters", name] for name in (*fields.ROPE_NUMBERS, "short_factor", "long_factor", "mscale", "type")
]
_HEADS = [["jaxalign_head", *path] for path in paths_of(HEAD, further=("follower", "num_labels", "bound", "labels"))]

READERS = {
    "config.json": Reader(_config, {"config.json": _CONFIG}, models.read_config),
    "config.json with a head": Reader(
        lambda folder: (folders_made.write(folder, {"config.json": SMALL | {"jaxalign_head": HEAD}}), None)[1],
        {"config.json": _HEADS},
        models.read_config,
    ),
    "config.json of a family": Reader(
        _families,
        {
            f"{name}/config.json": [[family.names.get(k) or k] for k in _MORE] + [[k] for k in family.defaults]
            for name, family in FAMILIES.items()
        },
        _read_families,
    ),
    "generation_config.json": Reader(
        lambda folder: (_config(folder), folders_made.write(folder, {"generation_config.json": GENERATION}), None)[2],
        {"generation_config.json": paths_of(GENERATION, further=("min_p", "bos_token_id", "max_length"))},
        _read_generation,
    ),
    "index of shards": Reader(
        _shards,
        {
            "model.safetensors.index.json": [
                ["weight_map"],
                ["metadata"],
                ["weight_map", "model.norm.weight"],
                ["weight_map", "x"],
            ]
        },
        models.load,
    ),
    "safetensors": Reader(write_model, {"model.safetensors": []}, models.load),
    "adapter_config.json": Reader(
        _adapter,
        {
            "adapter/adapter_config.json": paths_of(
                ADAPTER,
                further=(
                    "modules_to_save",
                    "exclude_modules",
                    "layers_pattern",
                    "layers_to_transform",
                    "use_rslora",
                    "revision",
                    "bias",
                ),
            ),
            "adapter/tokenizer.json": [
                ["added_tokens"],
                ["model"],
                ["added_tokens", 0],
                ["added_tokens", 0, "content"],
            ],
            "adapter/tokenizer_config.json": [["pad_token"]],
        },
        lambda folder: models.read_config(folder / "adapter"),
    ),
    "adapter_model.safetensors": Reader(
        _adapter, {"adapter/adapter_model.safetensors": []}, lambda folder: models.read_config(folder / "adapter")
    ),
    "tokenizer": Reader(
        _tokenizer,
        {
            "tokenizer.json": paths_of(_TOKENIZER),
            "tokenizer_config.json": [
                [name]
                for name in (
                    "tokenizer_class",
                    "eos_token",
                    "bos_token",
                    "pad_token",
                    "chat_template",
                    "model_max_length",
                    "added_tokens_decoder",
                    "auto_map",
                    "extra_special_tokens",
                    "additional_special_tokens",
                    "padding_side",
                )
            ],
            "config.json": [["eos_token_id"], ["model_type"], ["bos_token_id"], ["auto_map"]],
        },
        models.tokenizer,
    ),
    "tokenizer without settings": Reader(
        _bare_tokenizer,
        {
            "config.json": [["eos_token_id"], ["bos_token_id"]],
            "generation_config.json": [["eos_token_id"], ["bos_token_id"]],
        },
        models.tokenizer,
    ),
    "chat template": Reader(_template, {"chat_template.jinja": []}, _render),
    "pairs and texts": Reader(
        _lines,
        {"rows.jsonl": paths_of(PAIRS), "array.json": [], "table.csv": []},
        _read_rows,
    ),
    "compressed rows": Reader(_parquet, {"rows.parquet": [], "rows.jsonl.gz": []}, _read_rows),
    "prompts": Reader(
        _prompts,
        {
            "prompts.jsonl": [
                [0, "prompt"],
                [1, "messages"],
                [1, "messages", 0, "role"],
                [1, "messages", 1, "content"],
            ],
            "prompts.txt": [],
            "prompts.tsv": [],
        },
        _read_prompts,
    ),
    "run folder": Reader(_run, {f"run/{name}": paths_of(rows) for name, rows in RUN.items()}, _read_run),
    "option file": Reader(
        _options_file,
        {"options.json": [["name"], ["count"], ["share"], ["several"], ["x"]], "options.toml": []},
        _read_options,
    ),
}

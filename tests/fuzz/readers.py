"""The readers that are fuzzed: for each a folder of good files, what of them is changed, and how the folder is read."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from jaxalign import _options, data, models, policies
from jaxalign.evaluation.report import write_report
from jaxalign.models.families import FAMILIES
from jaxalign.models.hf import fields, files
from jaxalign.tokens import text_format
from tests import folders_made, token_cases
from tests.fuzz import model_folders
from tests.fuzz.changes import paths_of
from tests.fuzz.model_folders import ADAPTER, GENERATION, HEAD, SMALL, write_model


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader that is fuzzed."""

    make: Callable[[pathlib.Path], None]
    """Writes the good files into a folder."""
    paths: dict[str, list[list[Any]]]
    """File -> the paths of the fields that are changed; [] where only bytes are."""
    read: Callable[[pathlib.Path], object]
    """Reads the folder."""


def _read_families(folder: pathlib.Path) -> None:
    for name in FAMILIES:
        models.read_config(folder / name)


def _read_generation(folder: pathlib.Path) -> None:
    kept = models.read_config(folder).generation
    with files.naming_file(folder):  # which the text of the fields does not know
        policies.read_generation_config(kept)


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
    model_folders.tokenizer(folder)
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
    "config.json": Reader(model_folders.config, {"config.json": _CONFIG}, models.read_config),
    "config.json with a head": Reader(
        lambda folder: (folders_made.write(folder, {"config.json": SMALL | {"jaxalign_head": HEAD}}), None)[1],
        {"config.json": _HEADS},
        models.read_config,
    ),
    "config.json of a family": Reader(
        model_folders.families,
        {
            f"{name}/config.json": [[family.names.get(k) or k] for k in _MORE] + [[k] for k in family.defaults]
            for name, family in FAMILIES.items()
        },
        _read_families,
    ),
    "generation_config.json": Reader(
        lambda folder: (
            model_folders.config(folder),
            folders_made.write(folder, {"generation_config.json": GENERATION}),
            None,
        )[2],
        {"generation_config.json": paths_of(GENERATION, further=("min_p", "bos_token_id", "max_length"))},
        _read_generation,
    ),
    "index of shards": Reader(
        model_folders.shards,
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
        model_folders.adapter,
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
        model_folders.adapter,
        {"adapter/adapter_model.safetensors": []},
        lambda folder: models.read_config(folder / "adapter"),
    ),
    "tokenizer": Reader(
        model_folders.tokenizer,
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
        model_folders.bare_tokenizer,
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

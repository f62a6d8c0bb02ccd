"""Folders of adapters in peft's form: adapter_config.json and adapter_model.safetensors.

peft has one adapter for each of q, k, v, gate and up, where a fused projection here has one for all. Saving is exact:
each gets a copy of the shared `a` and its columns of `b`. Loading is exact too: parts that share their `a` become one
adapter of the same rank; others are set side by side, `b` block by block, and their ranks add up.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxalign import _hosts
from jaxalign._arrays import at_least_float32
from jaxalign.models.checks import named
from jaxalign.models.config import Config
from jaxalign.models.families import Rule, fuse, fused_shape, packed, split_sizes, unfuse, unpacked
from jaxalign.models.hf.adapter_fields import MUST_BE, SCORES, check_fields, module_scale, targets
from jaxalign.models.hf.config import BOUND, POOLING
from jaxalign.models.hf.files import local_folder, naming_file, read_json, whole_folder, write_json
from jaxalign.models.hf.tensors import rules_of, theirs_widths
from jaxalign.models.hf.weight_files import plain_name
from jaxalign.models.hf.weights import check_finite, open_tensors
from jaxalign.models.hf.writing import write_arrays
from jaxalign.models.language_model import LanguageModel
from jaxalign.models.lora import TARGETS, Lora, check_fits, pad_rank, pairs
from jaxalign.types import Array, Params

_PREFIX = "base_model.model."


def save_adapter(
    path: str | pathlib.Path,
    lm: LanguageModel,
    spec: Lora,
    adapter: Params,
    *,
    base: str = "",
    head: Params | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter as a folder that `load_adapter` and peft read, whole or not at all, as `models.save` does.

    Args:
      path: the folder.
      lm: the model that the adapter belongs to.
      spec: the adapter's.
      adapter: its tree.
      base: where the model comes from, for peft.
      head: the trained head of a reward model (its params["head"]), which is kept whole beside the products, as peft
        keeps a score; `models.load` of the folder gives the reward model.
      tokenizer: saved beside the adapter; a tokenizer of transformers. A reward model is read by its pad id.
      overwrite: whether a folder with files is replaced.

    Raises:
      ValueError: an adapter that does not fit the model, naming the tensor; a head that is not a reward model's; a
        folder that holds files without `overwrite`.
    """
    score = None if head is None else _score(lm, head)
    found = pairs(adapter)
    check_fits(_shapes(lm.config), adapter)
    # peft has one rank; zeros up to the largest change nothing, and alpha keeps the scale.
    rank = max(a.shape[1] for a, _ in found.values())
    tensors, modules, absent = {}, [], set()
    for place, rule in _projections(lm.config).items():
        if place not in found:
            absent |= {_short(key) for key in rule.theirs}
            continue
        a, b = pad_rank(*found[place], rank)
        parts = unfuse(lm.config, rule.sizes, b) if rule.sizes else [b]
        parts = [packed(lm.config, rule, parts)] if rule.packed else parts
        for key, part in zip(rule.theirs, parts, strict=True):
            module = key.removesuffix(".weight")
            modules.append(module)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.T
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = part.T
    alpha = spec.scale * (math.sqrt(rank) if spec.rslora else rank)
    values = {name: allowed[0] for name, allowed in MUST_BE.items()} | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": spec.rslora,
        "lora_dropout": 0.0,
        # A short name stands for the modules of all layers.
        "target_modules": sorted({m if _short(m) in absent else _short(m) for m in modules}),
        "inference_mode": True,
    }
    if _stored_in_out(lm.config):
        values["fan_in_fan_out"] = True
    if score is not None:
        tensors[f"{_PREFIX}score.weight"] = score
        values |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        if lm.config.reward_pooling == "mean":
            values[POOLING] = "mean"
        if lm.config.head is not None and lm.config.head.bound is not None:
            values[BOUND] = lm.config.head.bound
    tensors = _hosts.host_value(tensors)  # small; every process takes its part
    with _hosts.together():
        if _hosts.is_first():
            with whole_folder(path, overwrite=overwrite) as temporary:
                write_json(temporary / "adapter_config.json", values)
                write_arrays(temporary / "adapter_model.safetensors", tensors)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)


def _score(lm: LanguageModel, head: Params) -> Array:
    """The tensor of a reward head in a checkpoint."""
    config = lm.config
    if config.head is None or config.head.kind != "reward":
        raise ValueError(f"head: expected None for a model without a reward head, found one beside {config.head}")
    kernel: Array = head["score"]["kernel"]
    shape = (config.hidden_size, config.head.num_labels)
    if kernel.shape != shape:
        raise ValueError(f"head/score/kernel: expected shape {shape}, found {kernel.shape}")
    return kernel.T


class AdapterFile(NamedTuple):
    """An adapter as its folder holds it, by the names of the checkpoint's tensors."""

    products: dict[str, tuple[Array, Array, float]]
    """Name of a weight [out,in] -> (A [r,in], B [out,r], the scale of B·A), in the file's dtype."""
    saved: dict[str, Array]
    """Name of a tensor -> what stands in its place: "score.weight", "lm_head.weight"."""
    config: dict[str, Any]
    """The values of adapter_config.json."""


def read_adapter(folder: pathlib.Path, config: Config, *, check_finite: bool = True) -> AdapterFile:
    """Reads an adapter's folder.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      config: of the model that it belongs to.
      check_finite: as in `folders.load`.

    Raises:
      ValueError: a field that is not supported (`adapter_fields.check_fields`); tensors that are missing, surplus or
        misshapen, or not finite, by name; a file that is missing or cannot be read.
    """
    path = folder / "adapter_config.json"
    values = read_json(path)
    check_fields(values, path, stored_in_out=_stored_in_out(config))
    tensors = _read_tensors(folder, check_finite)
    products = {}
    for place, rule in _projections(config).items():
        inside, *outside = _shapes(config)[place]
        widths = theirs_widths(config, rule, tuple(outside))
        for key, width in zip(rule.theirs, widths, strict=True):
            found = _product(values, key.removesuffix(".weight"), inside, width, tensors)
            if found is not None:
                products[key] = found
    names = {*SCORES, "lm_head"} & set(values.get("modules_to_save") or [])
    saved = {key: tensors.pop(key) for key in [f"{name}.weight" for name in sorted(names)] if key in tensors}
    embedding = [name for name in tensors if "embed_tokens" in name]
    if embedding:
        raise ValueError(
            f"embed_tokens: expected an adapter of projections, found {named(sorted(embedding))} in {folder}: trained "
            "embeddings are not read; merge the adapter in peft (merge_and_unload) and load the whole model"
        )
    if tensors or not (products or saved):
        raise ValueError(
            f"adapter_model.safetensors: expected adapters of the projections of a {config.family} model with "
            f"{config.num_layers} layers, found {named(sorted(tensors))} in {folder}"
        )
    return AdapterFile(products, saved, values)


def load_adapter(path: str | pathlib.Path, lm: LanguageModel) -> tuple[Lora, Params]:
    """Loads an adapter from a folder that peft or `save_adapter` wrote.

    Args:
      path: the folder.
      lm: the model that the adapter belongs to.

    Returns:
      (spec, adapter in the model's dtype). Projections and parts that the file leaves out are zero. Where a pattern
      gives parts ranks or scales of their own, the ratio to the spec's scale is in their `b`.

    Raises:
      ValueError: a field of adapter_config.json that changes the computation and is not supported (DoRA, PiSSA,
        biases, …), tensors of another model (by name), a missing file; whole modules beside the products (a score, an
        lm_head), which `models.load` of the folder merges.
    """
    folder = local_folder(path)
    with naming_file(folder):
        found = read_adapter(folder, lm.config)
    if found.saved:
        raise ValueError(
            f"modules_to_save: expected low-rank products alone, found {named(found.saved)} in {folder}; "
            "models.load of the folder gives the merged model"
        )
    rank = int(found.config["r"])
    rslora = bool(found.config.get("use_rslora"))
    spec = Lora(rank, float(found.config["lora_alpha"]), rslora=rslora)
    flat, used = {}, set()
    for place, rule in _projections(lm.config).items():
        joined = _join(lm, place, rule, found.products, spec.scale)
        if joined is not None:
            for each in joined:
                check_finite(np.asarray(each), place, folder, made=f" as {lm.dtype}")
            flat[f"{place}/a"], flat[f"{place}/b"] = joined
            used.add(next(name for name, end in TARGETS.items() if place.endswith(f"/{end}")))
    return dataclasses.replace(spec, targets=tuple(n for n in TARGETS if n in used)), traverse_util.unflatten_dict(
        flat, sep="/"
    )


def _read_tensors(folder: pathlib.Path, finite: bool) -> dict[str, Array]:
    """Name of a tensor in the model, wrappers left out -> the tensor, in the file's dtype."""
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        pickled = sorted(path.name for path in folder.glob("adapter_model*.bin"))
        beside = f" but {named(pickled)}; load and save it in peft, which writes safetensors" if pickled else ""
        raise ValueError(f"{file.name}: expected in the folder, found no file {file}{beside}")
    tensors = {}
    with open_tensors(file, "flax") as opened:
        for key in opened.names():
            opened.shape(key)  # which refuses integers
            name = plain_name(key)
            if not name.startswith(_PREFIX):
                raise ValueError(f"{file.name}: expected names that begin with {_PREFIX!r}, found {key} in {folder}")
            if name.removeprefix(_PREFIX) in tensors:
                raise ValueError(f"{file.name}: expected one tensor {name}, found a second, {key}, in {folder}")
            tensors[name.removeprefix(_PREFIX)] = opened.read(key, finite=finite)
    return tensors


def _product(
    config: dict[str, Any], module: str, inside: int, outside: int, tensors: dict[str, Array]
) -> tuple[Array, Array, float] | None:
    """(A, B, scale) of a module, taken out of `tensors`; None where the adapter does not change it."""
    a, b = (tensors.pop(f"{module}.lora_{side}.weight", None) for side in "AB")
    wanted = targets(config, module)
    if (a is None) != (b is None):
        raise ValueError(f"{_PREFIX}{module}: expected lora_A and lora_B, found one without the other")
    if a is None or b is None:
        if wanted:
            raise ValueError(f"target_modules: expected lora_A and lora_B of {module}, which it names, found neither")
        return None
    if wanted is False:
        raise ValueError(f"target_modules: expected to name {module}, which has lora_A and lora_B, found it left out")
    rank, scale, ranked_by = module_scale(config, module)
    if a.shape[:1] != (rank,):
        raise ValueError(f"{ranked_by}: expected {a.shape[0]} as {module}.lora_A.weight has it, found {rank}")
    for side, tensor, shape in (("A", a, (rank, inside)), ("B", b, (outside, rank))):
        if tensor.shape != shape:
            raise ValueError(f"{module}.lora_{side}.weight: expected shape {shape}, found {tensor.shape}")
    return a, b, scale


def _join(
    lm: LanguageModel, place: str, rule: Rule, products: dict[str, tuple[Array, Array, float]], scale: float
) -> tuple[Array, Array] | None:
    """Our (a, b) from the parts of a projection; None where the file has none of them."""
    _, *outside = _shapes(lm.config)[place]
    widths = split_sizes(lm.config, rule.sizes) if rule.sizes else tuple(outside)
    parts, blocks = [], []
    for i, key in enumerate(rule.theirs):
        if key in products:
            a, b, own = products[key]
            if own != scale:  # in float32: bfloat16 may not hold the ratio
                b = at_least_float32(b) * (own / scale)
            parts.append(a.T.astype(lm.dtype))
            if rule.packed:
                alone = unpacked(lm.config, rule, b.T.astype(lm.dtype))
            else:
                alone = [jnp.zeros((b.shape[1], width), lm.dtype) for width in widths]
                alone[i] = b.T.astype(lm.dtype)
            blocks.append(fuse(lm.config, rule.sizes, alone) if rule.sizes else alone[0])
    if not parts:
        return None
    if all(a.shape == parts[0].shape and bool((a == parts[0]).all()) for a in parts):
        return parts[0], sum(blocks[1:], blocks[0])
    return jnp.concatenate(parts, axis=1), jnp.concatenate(blocks)


def _short(module: str) -> str:
    """ "q_proj" of "model.layers.0.self_attn.q_proj", or of the name of its weight."""
    return module.removesuffix(".weight").rpartition(".")[2]


def _stored_in_out(config: Config) -> bool:
    """Whether the family's matrices are [in, out] in a checkpoint, which peft calls fan_in_fan_out."""
    return not any(rule.transpose for rule in _projections(config).values())


def _projections(config: Config) -> dict[str, Rule]:
    """Place -> the rule of its kernel."""
    ends = tuple(f"/{end}/kernel" for end in TARGETS.values())
    table = [rule for rule in rules_of(config) if rule.ours.endswith(ends)]
    return {rule.ours.removeprefix("transformer/").removesuffix("/kernel"): rule for rule in table}


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Place -> (in, *out)."""
    heads, wide = config.num_heads * config.head_dim, config.intermediate_size
    sizes = {
        "qkv": (config.hidden_size, *fused_shape(config, "qkv")),
        "out": (heads, config.hidden_size),
        "gate_up": (config.hidden_size, *fused_shape(config, "gate_up")),
        "down": (wide, config.hidden_size),
    }
    names = [name for name in TARGETS if config.block.experts is None or name in ("qkv", "out")]
    return {f"layer_{i}/{TARGETS[name]}": sizes[name] for i in range(config.num_layers) for name in names}

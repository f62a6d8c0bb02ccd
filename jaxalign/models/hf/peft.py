"""Folders of adapters in peft's form: adapter_config.json and adapter_model.safetensors.

peft has one adapter for each of q, k, v, gate and up, where a fused projection here has one for all. Saving is exact:
each gets a copy of the shared `a` and its columns of `b`. Loading is exact too: parts that share their `a` become one
adapter of the same rank; others are set side by side, `b` block by block, and their ranks add up.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.flax import save_file

from jaxalign.models.config import Config
from jaxalign.models.families import Rule, split_sizes
from jaxalign.models.hf.files import read_json, whole_folder, write_json
from jaxalign.models.hf.tensors import rules_of
from jaxalign.models.language_model import LanguageModel
from jaxalign.models.lora import TARGETS, Lora, check_fits, pad_rank, pairs
from jaxalign.types import Array, Params

_PREFIX = "base_model.model."
_MUST_BE: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
}
"""Fields of adapter_config.json that change the computation, with the only values that are supported."""


def save_adapter(
    path: str | pathlib.Path,
    lm: LanguageModel,
    spec: Lora,
    adapter: Params,
    *,
    base: str = "",
    overwrite: bool = False,
) -> None:
    """Writes an adapter as a folder that `load_adapter` and peft read, whole or not at all, as `models.save` does.

    Args:
      path: the folder.
      lm: the model that the adapter belongs to.
      spec: the adapter's.
      adapter: its tree.
      base: where the model comes from, for peft.
      overwrite: whether a folder with files is replaced.

    Raises:
      ValueError: an adapter that does not fit the model, naming the tensor; a folder that holds files without
        `overwrite`.
    """
    found = pairs(adapter)
    check_fits(_shapes(lm.config), adapter)
    # peft has one rank; zeros up to the largest change nothing, and alpha keeps the scale.
    rank = max(a.shape[1] for a, _ in found.values())
    tensors, names = {}, set()
    for place, rule in _projections(lm.config).items():
        if place not in found:
            continue
        a, b = pad_rank(*found[place], rank)
        widths = split_sizes(lm.config, rule.sizes) if rule.sizes else (b.shape[1],)
        for key, part in zip(rule.theirs, jnp.split(b, np.cumsum(widths)[:-1].tolist(), axis=1), strict=True):
            module = key.removesuffix(".weight")
            names.add(module.rpartition(".")[2])
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.T
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = part.T
    alpha = spec.scale * rank
    values = _MUST_BE | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(names),
        "inference_mode": True,
    }
    with whole_folder(path, overwrite=overwrite) as temporary:
        write_json(temporary / "adapter_config.json", values)
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(path: str | pathlib.Path, lm: LanguageModel) -> tuple[Lora, Params]:
    """Loads an adapter from a folder that peft or `save_adapter` wrote.

    Args:
      path: the folder.
      lm: the model that the adapter belongs to.

    Returns:
      (spec, adapter in the model's dtype). Projections and parts that the file leaves out are zero.

    Raises:
      ValueError: a field of adapter_config.json that changes the computation and is not supported (DoRA, rsLoRA,
        biases, patterns of ranks), tensors of another model (by name), a missing file.
    """
    folder = pathlib.Path(path).expanduser()
    config = read_json(folder / "adapter_config.json")
    for name, expected in _MUST_BE.items():
        found = config.get(name, expected)
        if (found or None) != (expected or None):
            raise ValueError(f"{name}: expected {expected!r} in {folder}/adapter_config.json, found {found!r}")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or not 0 < config[name] < math.inf:
            raise ValueError(f"{name}: expected a value > 0 in {folder}/adapter_config.json, found {config.get(name)}")
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise ValueError(f"{file.name}: expected in the folder, found no file {file}")
    with safe_open(file, framework="flax") as handle:
        tensors = {key: handle.get_tensor(key).astype(lm.dtype) for key in handle.keys()}  # noqa: SIM118
    flat, targets = {}, []
    for place, rule in _projections(lm.config).items():
        joined = _join(lm.config, place, rule, tensors)
        if joined is not None:
            flat[f"{place}/a"], flat[f"{place}/b"] = joined
            targets.append(next(name for name, end in TARGETS.items() if place.endswith(f"/{end}")))
    if tensors or not flat:
        raise ValueError(
            f"{file.name}: expected adapters of the projections of a {lm.config.family} model with "
            f"{lm.config.num_layers} layers, found {sorted(tensors) or 'none'}"
        )
    spec = Lora(int(config["r"]), float(config["lora_alpha"]), tuple(name for name in TARGETS if name in targets))
    return spec, traverse_util.unflatten_dict(flat, sep="/")


def _join(config: Config, place: str, rule: Rule, tensors: dict[str, Array]) -> tuple[Array, Array] | None:
    """Our (a, b) from the parts of a projection, taken out of `tensors`; None where the file has none of them."""
    inside, outside = _shapes(config)[place]
    widths = split_sizes(config, rule.sizes) if rule.sizes else (outside,)
    parts, blocks, start = [], [], 0
    for key, width in zip(rule.theirs, widths, strict=True):
        name = _PREFIX + key.removesuffix(".weight")
        a, b = (tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB")
        if (a is None) != (b is None):
            raise ValueError(f"{name}: expected lora_A and lora_B, found one without the other")
        if a is not None and b is not None:
            rank = a.shape[0]
            for side, tensor, shape in (("A", a, (rank, inside)), ("B", b, (width, rank))):
                if tensor.shape != shape:
                    raise ValueError(f"{name}.lora_{side}.weight: expected shape {shape}, found {tensor.shape}")
            parts.append(a.T)
            blocks.append(jnp.pad(b.T, ((0, 0), (start, outside - start - width))))
        start += width
    if not parts:
        return None
    if all(a.shape == parts[0].shape and bool((a == parts[0]).all()) for a in parts):
        return parts[0], sum(blocks[1:], blocks[0])
    return jnp.concatenate(parts, axis=1), jnp.concatenate(blocks)


def _projections(config: Config) -> dict[str, Rule]:
    """Place -> the rule of its kernel."""
    ends = tuple(f"/{end}/kernel" for end in TARGETS.values())
    table = [rule for rule in rules_of(config) if rule.ours.endswith(ends)]
    return {rule.ours.removeprefix("transformer/").removesuffix("/kernel"): rule for rule in table}


def _shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Place -> (in, out)."""
    heads, wide = config.num_heads * config.head_dim, config.intermediate_size
    sizes = {
        "qkv": (config.hidden_size, sum(split_sizes(config, "qkv"))),
        "out": (heads, config.hidden_size),
        "gate_up": (config.hidden_size, 2 * wide),
        "down": (wide, config.hidden_size),
    }
    return {f"layer_{i}/{TARGETS[name]}": sizes[name] for i in range(config.num_layers) for name in TARGETS}

"""The fields of peft's adapter_config.json: what each means here, and the modules, ranks and scales that they give.

Denied by default: a field that is not in one of the tables below is refused by name, unless it is empty.
"""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any, NamedTuple

from jaxalign._files import printed
from jaxalign.models.block import MOST
from jaxalign.models.hf.fields import is_integer
from jaxalign.models.hf.patterns import check_pattern, key_pattern, layers_pattern

NEUTRAL = (
    "auto_mapping",  # which class of transformers the base was
    "base_model_name_or_path",  # read by `sources.find_source`
    "inference_mode",
    "lora_dropout",  # of training
    "megatron_core",  # the name of a package, used with megatron_config alone
    "peft_version",
    "qalora_group_size",  # used with use_qalora alone
    "revision",  # read by `sources.find_source`
    "task_type",  # SEQ_CLS asks for a score, which the tensors then hold
)
"""Fields that change nothing in what a trained adapter computes."""

SUPPORTED = (
    "alpha_pattern",
    "classifier_pooling",  # "mean": how the score is read; a field of ours, which peft does not know
    "exclude_modules",
    "jaxalign_bound",  # of the score; a field of ours as well
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
)
"""Fields that are read as peft reads them."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    # All other initialisations (pissa, olora, corda, loftq, …) may change the base's weights too.
    "init_lora_weights": (True, False, None, "gaussian"),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "ensure_weight_tying": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "loftq_config": ({}, None),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None,),
    "velora_config": (None,),
}
"""Fields that change what an adapter computes, and the values under which they do not: all others are refused."""

SCORES = ("score", "classifier")
"""What peft puts into modules_to_save of every sequence classifier, whichever of them the model has."""


class ModuleScale(NamedTuple):
    """What an adapter is at one module."""

    rank: int
    """r, of this module."""
    scale: float
    """What B·A is multiplied by."""
    ranked_by: str
    """The field that gives the rank, for messages: "r" or "rank_pattern"."""


def check_fields(config: dict[str, Any], file: pathlib.Path, *, stored_in_out: bool = False) -> None:
    """Checks every field of an adapter_config.json.

    Args:
      config: its values.
      file: named in messages.
      stored_in_out: whether the model's matrices are stored [in, out], as fan_in_fan_out says then (GPT-2).

    Raises:
      ValueError: a field that changes the computation in a way that is not supported, or that is not known and is not
        empty; the field and its value are named.
    """
    _check_types(config, file)
    for name, value in config.items():
        if name in NEUTRAL or name in SUPPORTED or (stored_in_out and name == "fan_in_fan_out"):
            continue
        if name not in MUST_BE:
            if not _is_empty(value):
                raise ValueError(
                    f"{name:.80}: expected a field of adapter_config.json that is known, or an empty one, found "
                    f"{printed(value)} in {file}"
                )
        elif not any(value is one or (type(value) is type(one) and value == one) for one in MUST_BE[name]):
            raise ValueError(f"{name}: expected {MUST_BE[name][0]!r} in {file}, found {printed(value)}")
    if config.get("peft_type") is None:
        raise ValueError(f"peft_type: expected 'LORA' in {file}, found nothing")
    for name in ("r", "lora_alpha"):
        if not _is_positive(config.get(name)):
            raise ValueError(f"{name}: expected a value > 0 in {file}, found {config.get(name)}")
    for name in ("rank_pattern", "alpha_pattern"):
        for key, value in (config.get(name) or {}).items():
            if not _is_positive(value) or value > MOST or (name == "rank_pattern" and not is_integer(value)):
                raise ValueError(f"{name}: expected values > 0 in {file}, found {value!r} for {key!r}")
            check_pattern(name, key, key_pattern(key), file)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            check_pattern(name, config[name], config[name], file)
    saved = config.get("modules_to_save") or []
    unknown = sorted(set(saved) - {*SCORES, "lm_head"})
    if unknown:
        raise ValueError(f"modules_to_save: expected some of {(*SCORES, 'lm_head')} in {file}, found {unknown}")


def _check_types(config: dict[str, Any], file: pathlib.Path) -> None:
    """ValueError for a field that is read and does not have the type that peft gives it."""

    def check(name: str, valid: bool, expected: str) -> None:
        if config.get(name) is not None and not valid:
            raise ValueError(f"{name}: expected {expected} in {file}, found {printed(config[name])}")

    for name in ("rank_pattern", "alpha_pattern"):
        check(name, isinstance(config.get(name), dict), "an object")
    for name in ("r", "lora_alpha"):
        check(name, _is_positive(config.get(name)) and config[name] <= MOST, f"a number > 0, at most {MOST},")
    check("r", is_integer(config.get("r")), "an integer")
    check("use_rslora", isinstance(config.get("use_rslora"), bool), "true or false")
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(name)
        several = isinstance(value, list) and all(isinstance(one, str) for one in value)
        check(name, several or (isinstance(value, str) and name != "modules_to_save"), "names")
    layers = config.get("layers_to_transform")
    check("layers_to_transform", all(map(is_integer, layers if isinstance(layers, list) else [layers])), "integers")
    patterns = config.get("layers_pattern") or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        check_pattern("layers_pattern", pattern, layers_pattern(pattern), file)


def module_scale(config: dict[str, Any], module: str) -> ModuleScale:
    """The rank and the scale of a module: r and lora_alpha, or what the first key that matches in a pattern says.

    Args:
      config: of an adapter_config.json that `check_fields` took.
      module: its name in the model, "model.layers.0.self_attn.q_proj".
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    by_rank, by_alpha = _first_match(ranks, module), _first_match(alphas, module)
    rank = int(config["r"] if by_rank is None else ranks[by_rank])
    alpha = float(config["lora_alpha"] if by_alpha is None else alphas[by_alpha])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return ModuleScale(rank, scale, "r" if by_rank is None else "rank_pattern")


def targets(config: dict[str, Any], module: str) -> bool | None:
    """Whether an adapter changes a module, by the rules of peft; None where the file leaves it open.

    A list holds ends of names, a string is a regular expression of a whole name, "all-linear" means every linear
    projection of the layers.

    Args:
      config: of an adapter_config.json that `check_fields` took.
      module: the name of a linear projection of a layer.
    """
    excluded, wanted = config.get("exclude_modules"), config.get("target_modules")
    if excluded and (re.fullmatch(excluded, module) if isinstance(excluded, str) else _ends(module, excluded)):
        return False
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return wanted.lower() == "all-linear" or re.fullmatch(wanted, module) is not None
    return _ends(module, wanted) and _in_layers(config, module)


def _ends(module: str, names: list[str]) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)


def _in_layers(config: dict[str, Any], module: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = None
    for pattern in patterns or [r"[^.]*"]:
        found = found or re.match(layers_pattern(pattern), module)
    wanted = layers if isinstance(layers, list) else [layers]
    return found is not None and int(found[found.re.groups]) in wanted


def _first_match(pattern: dict[str, Any], module: str) -> str | None:
    return next((key for key in pattern if re.match(key_pattern(key), module)), None)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

"""The fields of a config.json before they are read: each of the type and in the range that its readers take.

A value of another type is refused by name, also where Python would take it: "false" is true there, and NaN is a float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from jaxalign._files import is_number, printed
from jaxalign.models.block import MOST, MOST_LAYERS

MOST_EXPERTS = 1_000_000
"""Experts of all layers together, each of which has tensors of its own."""

COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "num_experts_per_tok",
    "num_labels",
    "word_embed_proj_dim",
    "num_ln_in_parallel_attn",
)
"""Integers, at least 1, or null."""

COUNTS_FROM_ZERO = ("num_local_experts", "num_experts", "max_window_layers")
"""Integers, at least 0, or null."""

NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "jaxalign_bound",
)
"""Finite numbers > 0, or null."""

FLAGS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bias",
    "enable_bias",
    "use_sliding_window",
    "norm_topk_prob",
    "new_decoder_architecture",
    "multi_query",
    "parallel_attn",
    "use_parallel_residual",
)
"""true or false, or null."""

IDS = ("bos_token_id", "pad_token_id")
"""One id or null; transformers takes -1 for none, and a pad id may lie outside the vocabulary."""

ROPE_NUMBERS = (
    "factor",
    "rope_theta",
    "partial_rotary_factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)
"""Of a set of rotary positions: finite numbers > 0, or null."""


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_types(values: Mapping[str, Any], *, names: Mapping[str, str | None] = {}) -> None:
    """Checks the fields of a config.json under Llama's names.

    Args:
      values: the fields.
      names: Llama's name of a field -> the family's, for messages.

    Raises:
      ValueError: the field, what was expected and what was found.
    """
    shown = {name: f"{name} ({theirs})" for name, theirs in names.items() if theirs is not None}
    _integer(values, "num_hidden_layers", 1, MOST_LAYERS, shown)
    for name in COUNTS:
        _integer(values, name, 1, MOST, shown)
    for name in COUNTS_FROM_ZERO:
        _integer(values, name, 0, MOST, shown)
    for name in IDS:
        _integer(values, name, -1, MOST, shown)
    for name in NUMBERS:
        _positive(values, name, shown.get(name, name))
    for name in FLAGS:
        _flag(values, name, name)
    for name in ("hidden_act", "model_type"):
        if values.get(name) is not None and not isinstance(values[name], str):
            raise ValueError(f"{shown.get(name, name)}: expected a name, found {printed(values[name])}")
    for name in ("auto_map", "id2label"):
        if values.get(name) is not None and not isinstance(values[name], dict):
            raise ValueError(f"{name}: expected an object, found {printed(values[name])}")
    for name in ("architectures", "layer_types"):
        _list(values, name, lambda each: isinstance(each, str), "a list of names")
    _list(values, "no_rope_layers", lambda each: is_integer(each) and each in (0, 1), "a list of 0 and 1")
    for layout in ("rope_parameters", "rope_scaling"):
        _check_rope(values.get(layout), layout)
    experts = max(values.get(name) or 0 for name in COUNTS_FROM_ZERO[:2])
    if experts * (values.get("num_hidden_layers") or 1) > MOST_EXPERTS:
        raise ValueError(f"num_experts: expected at most {MOST_EXPERTS} of all layers, found {experts} in each layer")


def check_end_ids(value: Any, *, vocab_size: int, known: Sequence[int] = ()) -> tuple[int, ...]:
    """eos_token_id as a tuple of ids: absent, one id or a list.

    Args:
      value: as the file has it.
      vocab_size: ids lie below it: a model never ends at others.
      known: ids beyond it that are taken all the same, as transformers writes a family's own into every file.

    Raises:
      ValueError: what are no ids of the vocabulary.
    """
    ids = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    for i in ids:
        if not is_integer(i) or i < 0 or (i >= vocab_size and i not in known):
            raise ValueError(f"eos_token_id: expected ids below vocab_size, {vocab_size}, found {printed(value)}")
    return ids


def _check_rope(settings: Any, layout: str) -> None:
    """One set of rotary positions, or a set for each kind of layer."""
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise ValueError(f"{layout}: expected an object, found {printed(settings)}")
    for kind, inner in settings.items():
        if isinstance(inner, dict) and "." not in layout:
            _check_rope(inner, f"{layout}.{kind}")
    shown = {name: f"{layout}.{name}" for name in settings}
    for name in ("rope_type", "type"):
        if settings.get(name) is not None and not isinstance(settings[name], str):
            raise ValueError(f"{layout}.{name}: expected a name, found {printed(settings[name])}")
    for name in ROPE_NUMBERS:
        _positive(settings, name, f"{layout}.{name}")
    _integer(settings, "original_max_position_embeddings", 2, MOST, shown)
    _flag(settings, "truncate", f"{layout}.truncate")
    for name in ("mscale", "mscale_all_dim"):
        value = settings.get(name)
        if value is not None and not (is_number(value) and value >= 0):
            raise ValueError(f"{layout}.{name}: expected a finite number >= 0, found {printed(value)}")
    for name in ("short_factor", "long_factor"):
        _list(settings, name, lambda each: is_number(each) and each > 0, "a list of numbers > 0", f"{layout}.{name}")


def _integer(values: Mapping[str, Any], name: str, least: int, most: int, shown: Mapping[str, str]) -> None:
    value = values.get(name)
    if value is not None and not (is_integer(value) and least <= value <= most):
        raise ValueError(f"{shown.get(name, name)}: expected an integer from {least} to {most}, found {printed(value)}")


def _positive(values: Mapping[str, Any], name: str, shown: str) -> None:
    value = values.get(name)
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(f"{shown}: expected a finite number > 0, found {printed(value)}")


def _flag(values: Mapping[str, Any], name: str, shown: str) -> None:
    if values.get(name) is not None and not isinstance(values[name], bool):
        raise ValueError(f"{shown}: expected true or false, found {printed(values[name])}")


def _list(values: Mapping[str, Any], name: str, fits: Callable[[Any], bool], expected: str, shown: str = "") -> None:
    value = values.get(name)
    if value is not None and not (isinstance(value, list | tuple) and all(fits(each) for each in value)):
        raise ValueError(f"{shown or name}: expected {expected}, found {printed(value)}")

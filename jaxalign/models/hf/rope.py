"""Rotary positions of a config.json to `Rope` and back, in both layouts: rope_parameters, or rope_theta and
rope_scaling at top level; one set for all layers, or one for each kind of layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.models.block import Rope
from jaxalign.models.config import Config
from jaxalign.models.families import Family

ORIGINAL = "original_max_position_embeddings"
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "longrope": ("short_factor", "long_factor", ORIGINAL),
}
"""rope_type -> what it is scaled by."""

OPTIONAL_FIELDS: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
"""rope_type -> what may be given beside that."""

KINDS = ("full_attention", "sliding_attention")


def read_ropes(
    values: Mapping[str, Any], family: Family, kinds: Sequence[str]
) -> tuple[Rope | None, tuple[Rope | None, ...]]:
    """(the rotary positions of all layers, those of each where they differ).

    Args:
      values: the fields of a config.json, with the family's defaults.
      family: says whether there are any, and of which sort.
      kinds: of each layer, of `KINDS`.

    Raises:
      ValueError: a kind, field or layout that is not supported, or one that is missing; it is named.
    """
    if family.ropes == "none":
        return None, ()
    if family.ropes == "local":
        by_kind = _settings_by_kind(values)
        found = {kind: _rope(by_kind[kind], values, family) for kind in KINDS}
        return None, tuple(found[kind] for kind in kinds)
    rope = _rope(_settings(values), values, family)
    if "no_rope_layers" not in family.reads:
        return rope, ()
    rotated = values["no_rope_layers"]  # 1: with positions, whatever its name
    if len(rotated) < len(kinds):
        raise ValueError(f"no_rope_layers: expected one for each of {len(kinds)} layers, found {rotated!r}")
    return rope, tuple(rope if flag else None for flag in rotated[: len(kinds)])


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """New files hold everything in rope_parameters; old ones rope_theta at top level and rope_scaling beside it."""
    settings: dict[str, Any] = {}
    for layout in ("rope_parameters", "rope_scaling"):
        given = values.get(layout) or {}
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            raise ValueError(f"{layout}: expected one flat set for all layers, found {given!r}")
        settings = _joined(settings, given, layout)
    return settings


def _joined(settings: Mapping[str, Any], given: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Both sets as one, the kind as rope_type: old files call it type. ValueError where they disagree."""
    found = dict(settings)
    if given.get("rope_type") is None and given.get("type") is not None:
        given = {**given, "rope_type": given["type"]}
    for name, value in given.items():
        if name != "type" and found.setdefault(name, value) != value:
            raise ValueError(f"{name}: expected one value, found {found[name]!r} and {value!r} in {layout}")
    return found


def _settings_by_kind(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A set for each kind of layer; the old layout scales those without a window alone."""
    given = values.get("rope_parameters") or {}
    if not isinstance(given, dict) or set(given) - set(KINDS) or not all(isinstance(v, dict) for v in given.values()):
        raise ValueError(f"rope_parameters: expected a set for each of {KINDS}, found {given!r}")
    full, local = (_joined({}, given.get(kind, {}), "rope_parameters") for kind in KINDS)
    full = _joined(full, values.get("rope_scaling") or {}, "rope_scaling")
    full.setdefault("rope_theta", values["rope_theta"])
    local.setdefault("rope_theta", values["rope_local_base_freq"])
    return {"full_attention": full, "sliding_attention": local}


def _rope(settings: dict[str, Any], values: Mapping[str, Any], family: Family) -> Rope:
    kind = settings.get("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise ValueError(f"rope_type: expected one of {sorted(ROPE_FIELDS)}, found {kind!r}")
    share = settings.get("partial_rotary_factor")
    if share is None and family.ropes == "partial":
        share = values.get("partial_rotary_factor")
    share = 1.0 if share is None else share
    if share != 1.0 and family.ropes != "partial":
        raise ValueError(f"partial_rotary_factor: expected 1.0, found {share!r}")
    if ORIGINAL in ROPE_FIELDS[kind]:  # as transformers: beside the set, in it, or the context itself
        settings = settings | {
            ORIGINAL: values.get(ORIGINAL) or settings.get(ORIGINAL) or values["max_position_embeddings"]
        }
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS["llama3"]}
    known |= {*ROPE_FIELDS[kind], *OPTIONAL_FIELDS.get(kind, ())}
    unknown = sorted(name for name in settings.keys() - known if settings[name] is not None)
    if unknown and kind != "default":
        raise ValueError(f"rope_parameters: expected {sorted(known)} for rope_type {kind!r}, found also {unknown}")
    missing = [name for name in ROPE_FIELDS[kind] if settings.get(name) is None]
    if missing:
        raise ValueError(f"rope_parameters: expected {missing} for rope_type {kind!r}, found {settings}")
    theta = float(settings.get("rope_theta") or values.get("rope_theta") or 10000.0)
    return Rope(theta, kind, share=float(share), **_numbers(kind, settings, values))


def _numbers(kind: str, settings: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a kind is scaled by, as fields of `Rope`."""
    found = {name: settings[name] for name in ROPE_FIELDS[kind]}
    if ORIGINAL in found:
        found["original_max_length"] = found.pop(ORIGINAL)
    if kind == "dynamic":
        found["original_max_length"] = values["max_position_embeddings"]
    if kind == "yarn":
        found["beta_fast"] = float(settings.get("beta_fast") or 32)
        found["beta_slow"] = float(settings.get("beta_slow") or 1)
        truncate = settings.get("truncate")
        found["truncate"] = True if truncate is None else bool(truncate)
        found["attention_factor"] = _yarn_attention(settings)
    if kind == "longrope":
        found["short_factors"], found["long_factors"] = found.pop("short_factor"), found.pop("long_factor")
        found["attention_factor"] = _longrope_attention(settings, values, found["original_max_length"])
    return found


def _yarn_attention(settings: Mapping[str, Any]) -> float:
    """0.1·m·ln(factor) + 1 (arXiv 2309.00071, eq. 22), or the ratio of two of them, or what is given."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    factor, both = settings["factor"], (settings.get("mscale"), settings.get("mscale_all_dim"))

    def scaled(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    return scaled(both[0]) / scaled(both[1]) if both[0] and both[1] else scaled(1.0)


def _longrope_attention(settings: Mapping[str, Any], values: Mapping[str, Any], original: int) -> float:
    """sqrt(1 + ln(factor)/ln(original)) (arXiv 2402.13753), or what is given."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    factor = settings.get("factor") or values["max_position_embeddings"] / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def context(values: Mapping[str, Any], rope: Rope | None) -> int:
    """The longest text [tokens]: max_position_embeddings, which "dynamic" stretches by its factor."""
    length = int(values["max_position_embeddings"])
    return int(length * rope.factor) if rope is not None and rope.kind == "dynamic" else length


def write_ropes(config: Config, family: Family) -> dict[str, Any]:
    """The fields of a config.json that `read_ropes` reads, and max_position_embeddings."""
    rope = config.rope
    dynamic = rope is not None and rope.kind == "dynamic"
    length = rope.original_max_length if rope is not None and dynamic else config.max_length
    found: dict[str, Any] = {"max_position_embeddings": length}
    if family.ropes == "none" or rope is None:
        return found
    if family.ropes == "local":
        by_kind: dict[str, Any] = {}
        for i in range(config.num_layers):
            kind = "full_attention" if config.window(i) is None else "sliding_attention"
            layer = config.layer_rope(i)
            if layer is not None:
                by_kind[kind] = _written(layer, family)
        return found | {"rope_parameters": by_kind}
    found["rope_parameters"] = _written(rope, family)
    if "no_rope_layers" in family.reads:
        found["no_rope_layers"] = [int(config.layer_rope(i) is not None) for i in range(config.num_layers)]
    return found


def _written(rope: Rope, family: Family) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if family.ropes == "partial":
        found["partial_rotary_factor"] = rope.share
    if rope.kind in ("linear", "dynamic", "yarn", "llama3"):
        found["factor"] = rope.factor
    if ORIGINAL in ROPE_FIELDS[rope.kind]:
        found[ORIGINAL] = rope.original_max_length
    if rope.kind == "llama3":
        found |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        found |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "longrope":
        found |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.kind in ("yarn", "longrope"):
        found["attention_factor"] = rope.attention_factor
    return found

"""config.json of transformers to `Config` and back, for every family, in both layouts of rope settings.

A field that changes the computation and is not supported raises and is named; fields that do not are passed over.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxalign.models.config import Config, Follower, Head, Rope, default_labels
from jaxalign.models.families import FAMILIES, Family

# Fields of other families or options that change what a layer computes, and the values under which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "attention_sinks": (None, False),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "attention_chunk_size": (None,),
    "qk_layernorm": (None, False),
    "use_parallel_residual": (None, False),
    "alibi": (None, False),
    "position_embedding_type": (None, "rope", "rotary"),
    "clip_qkv": (None,),
    "kv_lora_rank": (None,),
}


def family_of(name: Any) -> Family:
    """The family of a model_type. ValueError for one that is not known."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type: expected one of {sorted(FAMILIES)}, found {name!r}")
    return FAMILIES[name]


def config_from_hf(values: dict[str, Any]) -> Config:
    """The `Config` that a config.json of transformers describes.

    Args:
      values: the file's dict.

    Raises:
      ValueError: a field that is missing, or one that changes the computation and is not supported; it is named.
    """
    if not isinstance(values, dict):
        raise ValueError(f"values: expected the dict of a config.json, found {type(values).__name__}")
    name, code = values.get("model_type"), values.get("auto_map")
    if code and name not in FAMILIES:
        raise ValueError(f"auto_map: expected a model without code of its own, found {code!r} for model_type {name!r}")
    family = family_of(name)
    values = {**family.defaults, **values}
    for field, neutral in NEUTRAL.items():
        if field in values and values[field] not in neutral:
            raise ValueError(f"{field}: expected one of {neutral}, which is what is supported, found {values[field]!r}")
    for field in family.must_be_false:
        if values.get(field):
            raise ValueError(f"{field}: expected False for model_type {name!r}, found {values[field]!r}")

    def required(field: str) -> Any:
        if values.get(field) is None:
            raise ValueError(f"{field}: expected in a config.json of model_type {name!r}, found nothing")
        return values[field]

    def option(field: str) -> bool:
        source = family.options.get(field, False)
        return bool(values.get(source, False)) if isinstance(source, str) else source

    layers, heads, width = required("num_hidden_layers"), required("num_attention_heads"), required("hidden_size")
    return Config(
        vocab_size=required("vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        intermediate_size=required("intermediate_size"),
        max_length=required("max_position_embeddings"),
        family=values["model_type"],
        rope=_rope(values),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        windows=_windows(values, family, layers),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=option("qkv_bias"),
        out_bias=option("out_bias"),
        mlp_bias=option("mlp_bias"),
        qk_norm=option("qk_norm"),
        eos_ids=id_set(values.get("eos_token_id")),
        bos_id=values.get("bos_token_id"),
        pad_id=values.get("pad_token_id"),
        head=_head(values),
    )


def id_set(value: Any) -> tuple[int, ...]:
    """eos_token_id as a tuple of ids: absent, one id or a list."""
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)


ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""rope_type -> what it is scaled by."""


def _rope(values: dict[str, Any]) -> Rope:
    settings = _rope_settings(values)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_FIELDS:
        raise ValueError(f"rope_type: expected one of {sorted(ROPE_FIELDS)}, found {kind!r}")
    if settings.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor: expected 1.0, found {settings['partial_rotary_factor']!r}")
    if kind == "llama3":  # as transformers: beside the set, in it, or the context itself
        name = "original_max_position_embeddings"
        settings[name] = values.get(name) or settings.get(name) or values["max_position_embeddings"]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS["llama3"]}
    unknown = sorted(name for name in settings.keys() - known if settings[name] is not None)
    if unknown and kind != "default":
        raise ValueError(f"rope_parameters: expected {sorted(known)} for rope_type {kind!r}, found also {unknown}")
    missing = [name for name in ROPE_FIELDS[kind] if settings.get(name) is None]
    if missing:
        raise ValueError(f"rope_parameters: expected {missing} for rope_type {kind!r}, found {settings}")
    theta = float(settings.get("rope_theta") or values.get("rope_theta") or 10000.0)
    scaling = {name: settings[name] for name in ROPE_FIELDS[kind]}
    if kind == "llama3":
        scaling["original_max_length"] = scaling.pop("original_max_position_embeddings")
    return Rope(theta, kind, **scaling)


def _rope_settings(values: dict[str, Any]) -> dict[str, Any]:
    """New files hold everything in rope_parameters; old ones rope_theta at top level and rope_scaling beside it."""
    settings: dict[str, Any] = {}
    for layout in ("rope_parameters", "rope_scaling"):
        given = values.get(layout) or {}
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            raise ValueError(f"{layout}: expected one flat set for all layers, found {given!r}")
        for name, value in given.items():
            if settings.setdefault(name, value) != value:
                raise ValueError(f"{name}: expected one value, found {settings[name]!r} and {value!r} in {layout}")
    return settings


def _windows(values: dict[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    window = values.get("sliding_window")
    if family.windows == "never":
        return ()
    if family.windows == "every_layer":
        return (window,) * layers if window is not None else ()
    if not values.get("use_sliding_window", False) or window is None:
        return ()
    kinds = values.get("layer_types")
    if kinds is None:
        first = values["max_window_layers"]
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer_types: expected 'full_attention' or 'sliding_attention', found {unknown}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _head(values: dict[str, Any]) -> Head | None:
    architecture = (values.get("architectures") or [""])[0]
    own = values.get("jaxalign_head")
    if own is not None:
        unknown = sorted(set(own) - {field.name for field in dataclasses.fields(Head)})
        if unknown:
            raise ValueError(f"jaxalign_head: expected the fields of models.Head, found also {unknown}")
        follower = own.get("follower")
        return Head(**own | {"follower": None if follower is None else Follower(**follower)})
    code = sorted(name for name in values.get("auto_map") or {} if name.startswith("AutoModel"))
    if code:
        raise ValueError(f"auto_map: expected a model without code of its own, found {code}")
    if architecture.endswith("ForSequenceClassification"):
        labels = _labels(values)
        return Head("reward", num_labels=len(labels), bound=values.get("jaxalign_bound"), labels=labels)
    if architecture and not architecture.endswith("ForCausalLM"):
        raise ValueError(f"architectures: expected …ForCausalLM or …ForSequenceClassification, found {architecture!r}")
    return None


def _labels(values: dict[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's labels: id2label, or as many as num_labels says (2 where it is absent)."""
    named = values.get("id2label")
    if named is None:
        return default_labels(values.get("num_labels") or 2)
    if not isinstance(named, dict) or sorted(map(str, named)) != sorted(map(str, range(len(named)))):
        raise ValueError(f"id2label: expected a name for each id 0, 1, …, found {named!r}")
    names = {int(i): name for i, name in named.items()}
    return tuple(str(names[i]) for i in range(len(names)))


def config_to_hf(config: Config) -> dict[str, Any]:
    """The dict of a config.json that transformers reads, and whose `config_from_hf` is the same Config.

    Raises:
      ValueError: a family that is not known, or a Config that its family cannot express.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, found {config.family!r}")
    family = FAMILIES[config.family]
    reward = config.head is not None and config.head.kind == "reward"
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        rope |= {
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_max_length,
        }
    values: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [family.architecture + ("ForSequenceClassification" if reward else "ForCausalLM")],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) > 1 else (config.eos_ids or (None,))[0],
        "bos_token_id": config.bos_id,
        "pad_token_id": config.pad_id,
    }
    for field, source in family.options.items():
        if isinstance(source, str):
            values.setdefault(source, getattr(config, field))
    if family.windows == "every_layer":
        values["sliding_window"] = config.window(0)
    if family.windows == "by_layer":
        window = next((w for w in config.windows if w is not None), None)
        values["use_sliding_window"] = window is not None
        values["sliding_window"] = window
        values["layer_types"] = [
            "full_attention" if config.window(i) is None else "sliding_attention" for i in range(config.num_layers)
        ]
    if reward and config.head is not None:
        values["id2label"] = {str(i): name for i, name in enumerate(config.head.label_names)}
        values["label2id"] = {name: i for i, name in enumerate(config.head.label_names)}
        if config.head.bound is not None:
            values["jaxalign_bound"] = config.head.bound
    elif config.head is not None:
        values["jaxalign_head"] = dataclasses.asdict(config.head)
    if config_from_hf(values) != dataclasses.replace(config, generation=""):  # which has a file of its own
        raise ValueError(f"config: family {config.family!r} cannot express {config}")
    return values

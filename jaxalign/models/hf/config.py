"""config.json of transformers to `Config` and back, for every family, in both layouts of rope settings.

A field that changes the computation and is not supported raises and is named; fields that do not are passed over.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

from jaxalign.models.config import Config, Distribution, Follower, Head
from jaxalign.models.families import FAMILIES, Family
from jaxalign.models.hf.fields import check_end_ids, check_types
from jaxalign.models.hf.rope import KINDS, context, read_ropes, write_ropes

POOLING = "classifier_pooling"
BOUND = "jaxalign_bound"
"""The field of transformers' ModernBERT that says how a classifier pools; the classes of decoders pass it over."""

Part = TypeVar("Part", Head, Follower, Distribution)

# Fields that change what a layer computes, and the values under which they do nothing: others are refused unless the
# family reads the field (`Family.reads`).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "use_bidirectional_attention": (None, False),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "attention_sinks": (None, False),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "num_experts_per_tok": (None,),
    "norm_topk_prob": (None,),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "attention_chunk_size": (None,),
    "qk_layernorm": (None, False),
    "use_parallel_residual": (None, False),
    "parallel_attn": (None, False),
    "num_ln_in_parallel_attn": (None,),
    "new_decoder_architecture": (None, False),
    "multi_query": (None, False),
    "bias": (None, False),
    "alibi": (None, False),
    "position_embedding_type": (None, "rope", "rotary"),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
    "rope_local_base_freq": (None,),
    "sliding_window_pattern": (None,),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "do_layer_norm_before": (None, True),
    "_remove_final_layer_norm": (None, False),
    "layer_norm_elementwise_affine": (None, True),
    "word_embed_proj_dim": (None,),
    "enable_bias": (None, False),
    "clip_qkv": (None,),
    "kv_lora_rank": (None,),
}

NEVER_NULL = ("logits_scaling", "query_pre_attn_scalar", "max_window_layers", "rope_local_base_freq")
"""Fields that their families compute with and that may be absent, but not null."""

ACTIVATION_FIELDS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""What transformers calls an activation -> `Block.activation`."""


def family_of(name: Any) -> Family:
    """The family of a model_type. ValueError for one that is not known."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type: expected one of {sorted(FAMILIES)}, found {name!r}")
    return FAMILIES[name]


def config_from_hf(values: dict[str, Any]) -> Config:
    """The `Config` that a config.json of transformers describes.

    Args:
      values: the file's dict.

    Returns:
      The Config.

    Raises:
      ValueError: a field that is missing, or one that changes the computation and is not supported; it is named.
    """
    if not isinstance(values, dict):
        raise ValueError(f"values: expected the dict of a config.json, found {type(values).__name__}")
    name, code = values.get("model_type"), values.get("auto_map")
    if code and (not isinstance(name, str) or name not in FAMILIES):
        raise ValueError(f"auto_map: expected a model without code of its own, found {code!r} for model_type {name!r}")
    family = family_of(name)
    values = _canonical(values, family)
    for field, neutral in NEUTRAL.items():
        if field in values and field not in family.reads and values[field] not in neutral:
            raise ValueError(f"{field}: expected one of {neutral}, which is what is supported, found {values[field]!r}")
    check_types(values, names=family.names)
    for field, usual in family.defaults.items():
        if values[field] is None and usual is not None and field in NEVER_NULL:
            raise ValueError(f"{family.names.get(field) or field}: expected a value, found null")
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

    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"):
        required(field)
    values = family.complete(values)
    layers, heads, width = values["num_hidden_layers"], values["num_attention_heads"], values["hidden_size"]
    activation = ACTIVATION_FIELDS.get(values.get("hidden_act") or "silu")
    if activation is None:
        raise ValueError(f"hidden_act: expected one of {sorted(ACTIVATION_FIELDS)}, found {values['hidden_act']!r}")
    kinds = _layer_kinds(values, family, layers)
    rope, ropes = read_ropes(values, family, kinds)
    return Config(
        vocab_size=required("vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        intermediate_size=required("intermediate_size"),
        max_length=context(values, rope),
        family=values["model_type"],
        block=dataclasses.replace(family.block(values), activation=activation),
        rope=rope,
        ropes=ropes,
        norm_eps=values.get("rms_norm_eps", 1e-6),
        windows=_windows(values, family, kinds),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=option("qkv_bias"),
        out_bias=option("out_bias"),
        mlp_bias=option("mlp_bias"),
        qk_norm=option("qk_norm"),
        eos_ids=end_ids(values, values["model_type"], values["vocab_size"]),
        bos_id=values.get("bos_token_id"),
        pad_id=values.get("pad_token_id"),
        head=_head(values, family),
    )


def _canonical(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields under Llama's names, with the family's defaults for those that are absent."""
    renamed = dict(values)
    for name, theirs in family.names.items():
        if theirs is None:
            renamed.pop(name, None)
        elif theirs in values:
            renamed[name] = values[theirs]
    return {**family.defaults, **renamed}


def end_ids(values: dict[str, Any], family: str, vocab_size: int) -> tuple[int, ...]:
    """The ids of eos_token_id: absent, one or a list. ValueError for ids outside the vocabulary, but for the family's
    own, which transformers writes into every config.json of it, also of a small vocabulary."""
    own = FAMILIES[family].defaults.get("eos_token_id")
    return check_end_ids(values.get("eos_token_id"), vocab_size=vocab_size, known=() if own is None else (own,))


def _layer_kinds(values: dict[str, Any], family: Family, layers: int) -> list[str]:
    """Of each layer whether it has a window, of `rope.KINDS`."""
    window = values.get("sliding_window")
    if family.windows == "every_layer":
        return [KINDS[window is not None]] * layers
    if family.windows == "never" or (family.window_switch and not values.get("use_sliding_window", False)):
        return [KINDS[0]] * layers
    kinds = values.get("layer_types")
    if kinds is None and window is None:
        return [KINDS[0]] * layers
    if kinds is None:
        first = values["max_window_layers"]
        kinds = [KINDS[i >= first] for i in range(layers)]
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"layer_types: expected 'full_attention' or 'sliding_attention', found {unknown}")
    return list(kinds)


def _windows(values: dict[str, Any], family: Family, kinds: list[str]) -> tuple[int | None, ...]:
    window = None if family.windows == "never" else values.get("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _head(values: dict[str, Any], family: Family) -> Head | None:
    architecture = (values.get("architectures") or [""])[0]
    own = values.get("jaxalign_head")
    if own is not None:
        parts = dict(own) if isinstance(own, dict) else own
        if isinstance(own, dict) and own.get("follower") is not None:
            parts["follower"] = _made(Follower, own["follower"], "jaxalign_head.follower")
        if isinstance(own, dict) and own.get("distribution") is not None:
            parts["distribution"] = _made(Distribution, own["distribution"], "jaxalign_head.distribution")
        return _made(Head, parts, "jaxalign_head")
    code = sorted(
        name
        for name, target in (values.get("auto_map") or {}).items()
        if name.startswith("AutoModel") and not (family.code and str(target).startswith(family.code))
    )
    if code:
        raise ValueError(f"auto_map: expected a model without code of its own, found {code}")
    if architecture.endswith("ForSequenceClassification"):
        labels = _labels(values)
        bound, pooling = values.get(BOUND), read_pooling(values)
        count = values.get("num_labels") or 2 if values.get("id2label") is None else len(labels)
        return Head("reward", num_labels=count, bound=bound, labels=labels, pooling=pooling)
    causal = family.causal or "…ForCausalLM"
    if architecture and not architecture.endswith(causal.removeprefix("…")):
        raise ValueError(f"architectures: expected {causal} or …ForSequenceClassification, found {architecture!r}")
    return None


def read_pooling(values: dict[str, Any]) -> Literal["last", "mean"]:
    """How a reward head reads a text: the field of transformers' ModernBERT, "mean" or none.

    Args:
      values: of a config.json, or of an adapter_config.json.

    Returns:
      What `Head.pooling` says.

    Raises:
      ValueError: another value.
    """
    found = values.get(POOLING)
    if found not in (None, "mean"):
        raise ValueError(f"{POOLING}: expected 'mean' or none, found {found!r}")
    return "last" if found is None else "mean"


def _made(kind: type[Part], fields: Any, name: str) -> Part:
    """A dataclass of the fields that a config.json gives it. ValueError for others, or for values of other types."""
    known = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(fields, dict) or set(fields) - set(known):
        raise ValueError(f"{name}: expected an object of {', '.join(known)}, found {fields!r:.200}")
    try:
        return kind(**fields)
    except (TypeError, OverflowError) as error:  # a field that is missing, or not of the type that is computed with
        raise ValueError(f"{name}: expected the fields of models.{kind.__name__}, found {error}") from error


def _labels(values: dict[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's labels: id2label; () where it is absent, and num_labels says how many there are."""
    named = values.get("id2label")
    if named is None:
        return ()
    if not isinstance(named, dict) or sorted(map(str, named)) != sorted(map(str, range(len(named)))):
        raise ValueError(f"id2label: expected a name for each id 0, 1, …, found {named!r}")
    names = {int(i): name for i, name in named.items()}
    return tuple(str(names[i]) for i in range(len(names)))


def config_to_hf(config: Config) -> dict[str, Any]:
    """The dict of a config.json that transformers reads, and whose `config_from_hf` is the same Config.

    Args:
      config: the Config.

    Returns:
      The dict.

    Raises:
      ValueError: a family that is not known, or a Config that its family cannot express.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, found {config.family!r}")
    family = FAMILIES[config.family]
    reward = config.head is not None and config.head.kind == "reward"
    values: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [
            f"{family.architecture}ForSequenceClassification"
            if reward
            else family.causal or f"{family.architecture}ForCausalLM"
        ],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": _activation_field(config, family),
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) > 1 else (config.eos_ids or (None,))[0],
        "bos_token_id": config.bos_id,
        "pad_token_id": config.pad_id,
        **write_ropes(config, family),
    }
    for field, source in family.options.items():
        if isinstance(source, str):
            values.setdefault(source, getattr(config, field))
    if family.windows == "every_layer":
        values["sliding_window"] = config.window(0)
    if family.windows == "by_layer":
        window = next((w for w in config.windows if w is not None), None)
        if family.window_switch:
            values["use_sliding_window"] = window is not None
        values["sliding_window"] = window
        values["layer_types"] = [
            "full_attention" if config.window(i) is None else "sliding_attention" for i in range(config.num_layers)
        ]
    named = {family.names.get(name, name): value for name, value in values.items()}
    values = {name: value for name, value in named.items() if name is not None} | family.describe(config)
    if reward and config.head is not None:
        values["id2label"] = {str(i): name for i, name in enumerate(config.head.label_names)}
        values["label2id"] = {name: i for i, name in enumerate(config.head.label_names)}
        if config.head.bound is not None:
            values[BOUND] = config.head.bound
        if config.head.pooling == "mean":
            values[POOLING] = "mean"
    elif config.head is not None:
        values["jaxalign_head"] = dataclasses.asdict(config.head)
    if config_from_hf(values) != dataclasses.replace(config, generation=""):  # which has a file of its own
        raise ValueError(f"config: family {config.family!r} cannot express {config}")
    return values


def _activation_field(config: Config, family: Family) -> str:
    """What transformers calls the block's activation, as the family's own models have it where that is one of two."""
    usual = family.defaults.get("hidden_act", "silu")
    if ACTIVATION_FIELDS.get(usual) == config.block.activation:
        return str(usual)
    return next(name for name, ours in ACTIVATION_FIELDS.items() if ours == config.block.activation)

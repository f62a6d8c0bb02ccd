"""What a family of models is, names and rules as data, and how its rules are written out for a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxalign.models.config import Config
from jaxalign.types import Array


class Rule(NamedTuple):
    """How one of our arrays is made of the tensors of a checkpoint."""

    ours: str
    """Path of our array; {i} stands for the layer."""
    theirs: tuple[str, ...]
    """Names of the checkpoint's tensors, joined as `sizes` says."""
    transpose: bool = False
    """True where theirs are [out, in]."""
    sizes: str = ""
    """Which fused layout the join has ("qkv" or "gate_up", see `fuse`); "" for a single tensor."""


class Family(NamedTuple):
    """One family of models. A new one is a file with a Family, and an entry in `families.FAMILIES`."""

    architecture: str
    """The prefix of its names in "architectures", as in LlamaForCausalLM."""
    layer: tuple[Rule, ...]
    """The rules of every layer."""
    optional: tuple[tuple[str, tuple[Rule, ...]], ...] = ()
    """(field of `Config`, the rules that it switches on in every layer)."""
    options: Mapping[str, bool | str] = {}
    """Field of `Config` (a bool) -> its constant value, or the field of config.json that holds it (absent: False).
    Fields that are not named are False."""
    windows: Literal["never", "every_layer", "by_layer"] = "never"
    """Which layers a sliding window holds for: none, all, or those that "layer_types" names."""
    defaults: Mapping[str, Any] = {}
    """What transformers' config class takes a field to be where a config.json lacks it (a null is not a lack)."""
    must_be_false: tuple[str, ...] = ()
    """Fields of config.json that are refused where they are true."""


_LAYER = "model.layers.{i}."
_QKV = tuple(f"{_LAYER}self_attn.{name}_proj." for name in "qkv")
_GATE_UP = tuple(f"{_LAYER}mlp.{name}_proj." for name in ("gate", "up"))

EMBEDDING = (Rule("transformer/embedding", ("model.embed_tokens.weight",)),)
NORM = (Rule("transformer/norm/scale", ("model.norm.weight",)),)
LM_HEAD = (Rule("transformer/lm_head", ("lm_head.weight",), True),)
LAYER = (
    Rule("transformer/layer_{i}/attention_norm/scale", (_LAYER + "input_layernorm.weight",)),
    Rule("transformer/layer_{i}/attention/qkv/kernel", tuple(k + "weight" for k in _QKV), True, "qkv"),
    Rule("transformer/layer_{i}/attention/out/kernel", (_LAYER + "self_attn.o_proj.weight",), True),
    Rule("transformer/layer_{i}/mlp_norm/scale", (_LAYER + "post_attention_layernorm.weight",)),
    Rule("transformer/layer_{i}/gate_up/kernel", tuple(k + "weight" for k in _GATE_UP), True, "gate_up"),
    Rule("transformer/layer_{i}/down/kernel", (_LAYER + "mlp.down_proj.weight",), True),
)
QKV_BIAS = (Rule("transformer/layer_{i}/attention/qkv/bias", tuple(k + "bias" for k in _QKV), False, "qkv"),)
OUT_BIAS = (Rule("transformer/layer_{i}/attention/out/bias", (_LAYER + "self_attn.o_proj.bias",)),)
MLP_BIAS = (
    Rule("transformer/layer_{i}/gate_up/bias", tuple(k + "bias" for k in _GATE_UP), False, "gate_up"),
    Rule("transformer/layer_{i}/down/bias", (_LAYER + "mlp.down_proj.bias",)),
)
QK_NORM = (
    Rule("transformer/layer_{i}/attention/q_norm/scale", (_LAYER + "self_attn.q_norm.weight",)),
    Rule("transformer/layer_{i}/attention/k_norm/scale", (_LAYER + "self_attn.k_norm.weight",)),
)
REWARD_HEAD = (Rule("head/score/kernel", ("score.weight",), True),)
# Heads that no other library has keep our names; {name} is the layer's.
OWN_HEAD = (
    Rule("head/{name}/kernel", ("head.{name}.weight",), True),
    Rule("head/{name}/bias", ("head.{name}.bias",)),
)


def write_out(family: Family, config: Config) -> list[Rule]:
    """All rules of a configuration of this family, layers written out."""
    layer = [*family.layer]
    for name, extra in family.optional:
        layer += extra if getattr(config, name) else ()
    table = [*EMBEDDING]
    for i in range(config.num_layers):
        table += [_filled(rule, i=i) for rule in layer]
    table += NORM
    reward = config.head is not None and config.head.kind == "reward"
    if not config.tie_embeddings and not reward:
        table += LM_HEAD
    if reward:
        table += REWARD_HEAD
    elif config.head is not None:
        table += [_filled(rule, name=name) for name in (*config.head.hidden_layers, "outer") for rule in OWN_HEAD]
    return table


def _filled(rule: Rule, **values: Any) -> Rule:
    return rule._replace(ours=rule.ours.format(**values), theirs=tuple(key.format(**values) for key in rule.theirs))


def split_sizes(config: Config, sizes: str) -> tuple[int, ...]:
    """Widths of the parts of a fused array, "qkv" or "gate_up"."""
    if sizes == "qkv":
        return (config.num_heads * config.head_dim,) + (config.num_kv_heads * config.head_dim,) * 2
    return (config.intermediate_size,) * 2


def fused_shape(config: Config, sizes: str) -> tuple[int, ...]:
    """The axes of a fused array's columns, "qkv" or "gate_up": one axis of each is split over devices, so that each
    device gets whole heads, and columns of gate and up that belong together."""
    if sizes == "qkv":  # for each head of keys its queries, then k, then v
        return (config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_dim)
    return (2, config.intermediate_size)


def fuse(config: Config, sizes: str, parts: Sequence[Array]) -> Array:
    """Parts [...,width] of q, k and v, or of gate and up, as one array [..., *fused_shape]."""
    heads, _, head_dim = fused_shape(config, "qkv")
    if sizes == "qkv":
        return jnp.concatenate([x.reshape(*x.shape[:-1], heads, -1, head_dim) for x in parts], axis=-2)
    return jnp.stack(parts, axis=-2)


def unfuse(config: Config, sizes: str, array: Array) -> list[Array]:
    """The parts [...,width] of an array [..., *fused_shape]: `fuse` undone."""
    if sizes == "qkv":
        group = array.shape[-2] - 2
        parts = jnp.split(array, [group, group + 1], axis=-2)
    else:
        parts = jnp.split(array, 2, axis=-2)
    ahead = array.shape[: array.ndim - len(fused_shape(config, sizes))]
    return [part.reshape(*ahead, -1) for part in parts]


def is_harmless(config: Config, key: str) -> bool:
    """Whether a checkpoint may hold this tensor beyond the table.

    Buffers of rotary positions are of that kind, which a config gives, and the copy of a tied lm_head."""
    if config.tie_embeddings and key == "lm_head.weight":
        return True
    return re.search(r"(^|\.)rotary_emb\.(original_)?inv_freq$|\.rotary_emb\.(cos|sin)_cached$", key) is not None

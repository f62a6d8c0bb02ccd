"""What a family of models is, names and rules as data, and how its rules are written out for a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign.models.block import Block
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
    packed: Literal["", "concatenated", "by_group", "experts"] = ""
    """How theirs are packed (see `unpacked`): one tensor for each part, all parts in one tensor after each other or by
    groups of heads, or a tensor for each expert."""


def _nothing(config: Config) -> dict[str, Any]:
    return {}


def _llama(values: Mapping[str, Any]) -> Block:
    return Block()


class Family(NamedTuple):
    """One family of models. A new one is a file with a Family, and an entry in `families.FAMILIES`."""

    architecture: str
    """The prefix of its names in "architectures", as in LlamaForCausalLM."""
    layer: tuple[Rule, ...]
    """The rules of every layer."""
    optional: tuple[tuple[str | Callable[[Config], bool], tuple[Rule, ...]], ...] = ()
    """(field of `Config`, or a function of it; the rules that it switches on in every layer)."""
    options: Mapping[str, bool | str] = {}
    """Field of `Config` (a bool) -> its constant value, or the field of config.json that holds it (absent: False).
    Fields that are not named are False."""
    windows: Literal["never", "every_layer", "by_layer"] = "never"
    """Which layers a sliding window holds for: none, all, or those that "layer_types" names."""
    window_switch: bool = True
    """Of "by_layer": whether use_sliding_window must be true for there to be windows."""
    defaults: Mapping[str, Any] = {}
    """What transformers' config class takes a field to be where a config.json lacks it (a null is not a lack)."""
    must_be_false: tuple[str, ...] = ()
    """Fields of config.json that are refused where they are true."""
    names: Mapping[str, str | None] = {}
    """Llama's name of a field -> this family's; None where it has no such field."""
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Fields of config.json -> the same, with what transformers makes of others where they are absent or null."""
    block: Callable[[Mapping[str, Any]], Block] = _llama
    """Fields of config.json -> the block, but for its activation."""
    describe: Callable[[Config], dict[str, Any]] = _nothing
    """A config -> the fields of config.json that `complete` and `block` read."""
    reads: tuple[str, ...] = ()
    """The fields of `hf.config.NEUTRAL` that this family reads, and which are therefore not refused."""
    ropes: Literal["none", "one", "partial", "local"] = "one"
    """Rotary positions: none; one kind; of a part of each head ("partial_rotary_factor"); a kind of their own in layers
    with a window ("local")."""
    surround: tuple[Rule, ...] = ()
    """The rules of what surrounds the layers, in place of `SURROUND`."""
    lm_head: str = "lm_head.weight"
    """The name of the output matrix."""
    prefix: str = "model."
    """What names begin with, and may lack in a file of the model without a head."""
    causal: str = ""
    """The whole name of a language model in "architectures", where it is not the prefix with ForCausalLM."""
    code: str = ""
    """What names in "auto_map" begin with that stand for transformers' own class, which was the folder's code once."""
    harmless: str = ""
    """A regular expression of names of buffers that are passed over, with those of `is_harmless`."""


def linear(ours: str, *theirs: str, sizes: str = "", packed: Literal["", "concatenated", "by_group"] = "") -> Rule:
    """The rule of a layer's matrices [out, in]."""
    names = tuple(f"{name}.weight" for name in theirs)
    return Rule(f"transformer/layer_{{i}}/{ours}/kernel", names, True, sizes, packed)


def bias(ours: str, *theirs: str, sizes: str = "", packed: Literal["", "concatenated", "by_group"] = "") -> Rule:
    """The rule of a layer's biases [out]."""
    names = tuple(f"{name}.bias" for name in theirs)
    return Rule(f"transformer/layer_{{i}}/{ours}/bias", names, False, sizes, packed)


def scale(ours: str, theirs: str) -> Rule:
    """The rule of a layer's norm."""
    return Rule(f"transformer/layer_{{i}}/{ours}/scale", (f"{theirs}.weight",))


def layer_norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """The rules of a layer's norm with a bias."""
    return scale(ours, theirs), Rule(f"transformer/layer_{{i}}/{ours}/bias", (f"{theirs}.bias",))


PREFIX_LAYER = "model.layers.{i}."
_QKV = tuple(f"{PREFIX_LAYER}self_attn.{name}_proj." for name in "qkv")
_GATE_UP = tuple(f"{PREFIX_LAYER}mlp.{name}_proj." for name in ("gate", "up"))

EMBEDDING = (Rule("transformer/embedding", ("model.embed_tokens.weight",)),)
NORM = (Rule("transformer/norm/scale", ("model.norm.weight",)),)
SURROUND = (*EMBEDDING, *NORM)
ATTENTION = (
    Rule("transformer/layer_{i}/attention_norm/scale", (PREFIX_LAYER + "input_layernorm.weight",)),
    Rule("transformer/layer_{i}/attention/qkv/kernel", tuple(k + "weight" for k in _QKV), True, "qkv"),
    Rule("transformer/layer_{i}/attention/out/kernel", (PREFIX_LAYER + "self_attn.o_proj.weight",), True),
    Rule("transformer/layer_{i}/mlp_norm/scale", (PREFIX_LAYER + "post_attention_layernorm.weight",)),
)
LAYER = (
    *ATTENTION,
    Rule("transformer/layer_{i}/gate_up/kernel", tuple(k + "weight" for k in _GATE_UP), True, "gate_up"),
    Rule("transformer/layer_{i}/down/kernel", (PREFIX_LAYER + "mlp.down_proj.weight",), True),
)
QKV_BIAS = (Rule("transformer/layer_{i}/attention/qkv/bias", tuple(k + "bias" for k in _QKV), False, "qkv"),)
OUT_BIAS = (Rule("transformer/layer_{i}/attention/out/bias", (PREFIX_LAYER + "self_attn.o_proj.bias",)),)
MLP_BIAS = (
    Rule("transformer/layer_{i}/gate_up/bias", tuple(k + "bias" for k in _GATE_UP), False, "gate_up"),
    Rule("transformer/layer_{i}/down/bias", (PREFIX_LAYER + "mlp.down_proj.bias",)),
)
QK_NORM = (
    Rule("transformer/layer_{i}/attention/q_norm/scale", (PREFIX_LAYER + "self_attn.q_norm.weight",)),
    Rule("transformer/layer_{i}/attention/k_norm/scale", (PREFIX_LAYER + "self_attn.k_norm.weight",)),
)
REWARD_HEAD = (Rule("head/score/kernel", ("score.weight",), True),)
# Heads that no other library has keep our names; {name} is the layer's.
OWN_HEAD = (
    Rule("head/{name}/kernel", ("head.{name}.weight",), True),
    Rule("head/{name}/bias", ("head.{name}.bias",)),
)
LAWS_AFTER_TOKENS = (Rule("head/tokens", ("head.tokens.weight",)), Rule("head/own", ("head.own.weight",)))


def write_out(family: Family, config: Config) -> list[Rule]:
    """All rules of a configuration of this family, layers written out."""
    layer = [*family.layer]
    for name, extra in family.optional:
        layer += extra if (getattr(config, name) if isinstance(name, str) else name(config)) else ()
    table = [*(family.surround or SURROUND)]
    for i in range(config.num_layers):
        table += [_filled(rule, i=i) for rule in layer]
    if config.block.experts is not None:
        table = [_each_expert(rule, config.block.experts.count) for rule in table]
    reward = config.head is not None and config.head.kind == "reward"
    if not config.tie_embeddings and not reward:
        table.append(Rule("transformer/lm_head", (family.lm_head,), True))
    if reward:
        table += REWARD_HEAD
    elif config.head is not None:
        table += [_filled(rule, name=name) for name in (*config.head.hidden_layers, "outer") for rule in OWN_HEAD]
        if config.head.kind == "q" and config.head.distribution is not None:
            table += LAWS_AFTER_TOKENS
    return table


def _filled(rule: Rule, **values: Any) -> Rule:
    def fill(name: str) -> str:
        for key, value in values.items():
            name = name.replace(f"{{{key}}}", str(value))
        return name

    return rule._replace(ours=fill(rule.ours), theirs=tuple(fill(key) for key in rule.theirs))


def _each_expert(rule: Rule, count: int) -> Rule:
    if rule.packed != "experts":
        return rule
    return rule._replace(theirs=tuple(key.replace("{e}", str(e)) for e in range(count) for key in rule.theirs))


def split_sizes(config: Config, sizes: str) -> tuple[int, ...]:
    """Widths of the parts of a fused array, "qkv" or "gate_up"."""
    if sizes == "qkv":
        return (config.num_heads * config.head_dim,) + (config.num_kv_heads * config.head_dim,) * 2
    return (config.intermediate_size,) * (1 + config.block.gated)


def fused_shape(config: Config, sizes: str) -> tuple[int, ...]:
    """The axes of a fused array's columns, "qkv" or "gate_up": one axis of each is split over devices, so that each
    device gets whole heads, and columns of gate and up that belong together."""
    if sizes == "qkv":  # for each head of keys its queries, then k, then v
        return (config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_dim)
    return (1 + config.block.gated, config.intermediate_size)


def numpy_of(array: Any) -> Any:
    """numpy for arrays of the host, jax.numpy for others."""
    return np if isinstance(array, np.ndarray) else jnp


def fuse(config: Config, sizes: str, parts: Sequence[Any]) -> Array:
    """Parts [...,width] of q, k and v, or of gate and up, as one array [..., *fused_shape]; of parts of some heads of
    keys, or some columns, the array of these."""
    xp, join = numpy_of(parts[0]), "stack"
    if sizes == "qkv":
        heads, join = parts[1].shape[-1] // config.head_dim, "concatenate"
        parts = [x.reshape(*x.shape[:-1], heads, -1, config.head_dim) for x in parts]
    joined: Array = getattr(xp, join)(parts, axis=-2)
    return joined


def unfuse(config: Config, sizes: str, array: Any) -> list[Array]:
    """The parts [...,width] of an array [..., *fused_shape]: `fuse` undone."""
    xp = numpy_of(array)
    group = array.shape[-2] - 2
    parts = xp.split(array, [group, group + 1] if sizes == "qkv" else array.shape[-2], axis=-2)
    ahead = array.shape[: array.ndim - len(fused_shape(config, sizes))]
    return [part.reshape(*ahead, -1) for part in parts]


def is_harmless(family: Family, config: Config, key: str) -> bool:
    """Whether a checkpoint may hold this tensor beyond the table.

    Buffers of rotary positions are of that kind, which a config gives, and the copy of a tied lm_head."""
    if config.tie_embeddings and key == family.lm_head:
        return True
    buffers = r"(^|\.)rotary_emb\.(original_)?inv_freq$|\.rotary_emb\.(cos|sin)_cached$"
    return re.search(f"{buffers}|{family.harmless}" if family.harmless else buffers, key) is not None

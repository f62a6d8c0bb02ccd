"""The two-way table between our parameters and the tensors of a checkpoint, one per family, as data."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxalign.models.config import Config


class Rule(NamedTuple):
    """ours: path of one array, {i} for the layer; theirs: the tensors it is made of, joined along our last axis;
    transpose: theirs are [out, in]; sizes: which split the join has."""

    ours: str
    theirs: tuple[str, ...]
    transpose: bool = False
    sizes: str = ""


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

FAMILY_LAYERS = {
    "llama": (LAYER, (("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("mlp_bias", MLP_BIAS))),
    "mistral": (LAYER, ()),
    "qwen2": (LAYER, (("qkv_bias", QKV_BIAS),)),
    "qwen3": (LAYER, (("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("qk_norm", QK_NORM))),
}
"""Per family: the rules of every layer, and those that a field of the config switches on."""


def rules(config: Config) -> list[Rule]:
    """All rules of a configuration, layers written out."""
    always, optional = FAMILY_LAYERS[config.family]
    layer = [*always]
    for name, extra in optional:
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
    """Widths of the parts of a fused array."""
    if sizes == "qkv":
        return (config.num_heads * config.head_dim,) + (config.num_kv_heads * config.head_dim,) * 2
    return (config.intermediate_size,) * 2


def harmless(config: Config, key: str) -> bool:
    """Tensors that a checkpoint may hold beyond the table: rotary buffers of old files, a tied lm_head's copy."""
    return key.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and key == "lm_head.weight")

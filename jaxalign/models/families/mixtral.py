"""Mixtral: Mistral with experts in place of each MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.block import Block, Experts
from jaxalign.models.config import Config
from jaxalign.models.families.rules import ATTENTION, PREFIX_LAYER, Family, Rule

_EXPERT = PREFIX_LAYER + "block_sparse_moe.experts.{e}."


def block(values: Mapping[str, Any]) -> Block:
    return Block(experts=Experts(values["num_local_experts"], values["num_experts_per_tok"]))


def describe(config: Config) -> dict[str, Any]:
    experts = config.block.experts
    return {} if experts is None else {"num_local_experts": experts.count, "num_experts_per_tok": experts.per_token}


MIXTRAL = Family(
    "Mixtral",
    (
        *ATTENTION,
        Rule("transformer/layer_{i}/experts/router", (PREFIX_LAYER + "block_sparse_moe.gate.weight",), True),
        Rule(
            "transformer/layer_{i}/experts/gate_up",
            (_EXPERT + "w1.weight", _EXPERT + "w3.weight"),
            True,
            packed="experts",
        ),
        Rule("transformer/layer_{i}/experts/down", (_EXPERT + "w2.weight",), True, packed="experts"),
    ),
    windows="every_layer",
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    must_be_false=("attention_bias",),
    block=block,
    describe=describe,
    reads=("num_local_experts", "num_experts_per_tok"),
)

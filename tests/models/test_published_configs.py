"""config.json of published models of each family, in the layout that their folders have: what is read of them, and that
it is written back. And what is refused of each family, by name."""

from __future__ import annotations

from typing import Any

import pytest

from jaxalign import models
from jaxalign.models.block import Block, Experts, Rope

LONG = [1.0 + 0.5 * i for i in range(48)]
SHORT = [1.0 + 0.01 * i for i in range(48)]


def named(model_type: str, architecture: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], "torch_dtype": "bfloat16", **fields}


GEMMA2 = named(
    "gemma2",
    "Gemma2ForCausalLM",
    attention_bias=False,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    cache_implementation="hybrid",
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=2304,
    intermediate_size=9216,
    max_position_embeddings=8192,
    num_attention_heads=8,
    num_hidden_layers=26,
    num_key_value_heads=4,
    query_pre_attn_scalar=256,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=256000,
)
GEMMA3 = named(
    "gemma3_text",
    "Gemma3ForCausalLM",
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    eos_token_id=[1, 106],
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152,
    intermediate_size=6912,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
)
PHI3 = named(
    "phi3",
    "Phi3ForCausalLM",
    attention_bias=False,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    hidden_act="silu",
    hidden_size=3072,
    intermediate_size=8192,
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    original_max_position_embeddings=4096,
    rms_norm_eps=1e-05,
    rope_scaling={"type": "su", "short_factor": SHORT, "long_factor": LONG},
    rope_theta=10000.0,
    sliding_window=262144,
    vocab_size=32064,
)
GPT2 = named(
    "gpt2",
    "GPT2LMHeadModel",
    activation_function="gelu_new",
    bos_token_id=50256,
    eos_token_id=50256,
    layer_norm_epsilon=1e-05,
    n_ctx=1024,
    n_embd=768,
    n_head=12,
    n_layer=12,
    n_positions=1024,
    summary_type="cls_index",
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    vocab_size=50257,
)
PYTHIA = named(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    bos_token_id=0,
    eos_token_id=0,
    hidden_act="gelu",
    hidden_size=512,
    intermediate_size=2048,
    layer_norm_eps=1e-05,
    max_position_embeddings=2048,
    num_attention_heads=8,
    num_hidden_layers=6,
    rotary_emb_base=10000,
    rotary_pct=0.25,
    tie_word_embeddings=False,
    use_parallel_residual=True,
    vocab_size=50304,
)
OPT = named(
    "opt",
    "OPTForCausalLM",
    activation_function="relu",
    do_layer_norm_before=True,
    ffn_dim=3072,
    hidden_size=768,
    max_position_embeddings=2048,
    num_attention_heads=12,
    num_hidden_layers=12,
    prefix="</s>",
    vocab_size=50272,
    word_embed_proj_dim=768,
)
FALCON = named(
    "falcon",
    "FalconForCausalLM",
    alibi=False,
    auto_map={"AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"},
    bias=False,
    hidden_size=4544,
    layer_norm_epsilon=1e-05,
    multi_query=True,
    new_decoder_architecture=False,
    num_attention_heads=71,
    num_hidden_layers=32,
    parallel_attn=True,
    vocab_size=65024,
)
MIXTRAL = named(
    "mixtral",
    "MixtralForCausalLM",
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_experts_per_tok=2,
    num_hidden_layers=32,
    num_key_value_heads=8,
    num_local_experts=8,
    output_router_logits=False,
    rms_norm_eps=1e-05,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.02,
    sliding_window=None,
    tie_word_embeddings=False,
    vocab_size=32000,
)
QWEN3_MOE = named(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    attention_bias=False,
    bos_token_id=151643,
    decoder_sparse_step=1,
    eos_token_id=151645,
    head_dim=128,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=6144,
    max_position_embeddings=40960,
    max_window_layers=48,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=48,
    num_key_value_heads=4,
    rope_scaling=None,
    rope_theta=1000000.0,
    sliding_window=None,
    use_sliding_window=False,
    vocab_size=151936,
)
OLMO2 = named(
    "olmo2",
    "Olmo2ForCausalLM",
    eos_token_id=100257,
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=11008,
    max_position_embeddings=4096,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    pad_token_id=100277,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=500000,
    vocab_size=100352,
)
SMOLLM3 = named(
    "smollm3",
    "SmolLM3ForCausalLM",
    eos_token_id=128012,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=11008,
    layer_types=["full_attention"] * 36,
    max_position_embeddings=65536,
    max_window_layers=28,
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9,
    num_attention_heads=16,
    num_hidden_layers=36,
    num_key_value_heads=4,
    rope_scaling=None,
    rope_theta=5000000.0,
    sliding_window=None,
    use_sliding_window=False,
    vocab_size=128256,
)
GRANITE = named(
    "granite",
    "GraniteForCausalLM",
    attention_multiplier=0.015625,
    embedding_multiplier=12.0,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=8192,
    logits_scaling=49.0,  # 1/(1/49) is not 49 in binary
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=40,
    num_key_value_heads=8,
    residual_multiplier=0.22,
    rms_norm_eps=1e-05,
    rope_theta=5000000.0,
    tie_word_embeddings=True,
    vocab_size=49155,
)
LAYER_NORM = {"norm": "layer", "gated": False}
# The file, what its block says, and other fields of its Config.
PUBLISHED: dict[str, tuple[dict[str, Any], Block, dict[str, Any]]] = {
    "gemma-2-2b": (
        GEMMA2,
        Block(
            norm_offset=1.0,
            norm_place="both",
            activation="gelu_tanh",
            query_scale=1 / 16,
            attention_cap=50.0,
            logits_cap=30.0,
            embedding_scale=48.0,
        ),
        {"tie_embeddings": True, "windows": (4096, None) * 13, "rope": Rope(), "eos_ids": (1,)},
    ),
    "gemma-3-1b-it": (
        GEMMA3,
        Block(
            norm_offset=1.0,
            norm_place="both",
            activation="gelu_tanh",
            query_scale=1 / 16,
            embedding_scale=1152**0.5,
        ),
        {
            "qk_norm": True,
            "windows": ((512,) * 5 + (None,)) * 4 + (512,) * 2,
            "ropes": ((Rope(1e4),) * 5 + (Rope(1e6),)) * 4 + (Rope(1e4),) * 2,
            "eos_ids": (1, 106),
        },
    ),
    "Phi-3-mini-128k": (
        PHI3,
        Block(),
        {
            "rope": Rope(
                10000.0,
                "longrope",
                original_max_length=4096,
                attention_factor=1.1902380714238083,
                short_factors=tuple(SHORT),
                long_factors=tuple(LONG),
            ),
            "windows": (262144,) * 32,
            "eos_ids": (32000,),
            "pad_id": 32000,
        },
    ),
    "gpt2": (
        GPT2,
        Block(**LAYER_NORM, activation="gelu_tanh", learned_positions=True),
        {"intermediate_size": 3072, "max_length": 1024, "rope": None, "mlp_bias": True, "tie_embeddings": True},
    ),
    "pythia-70m": (
        PYTHIA,
        Block(**LAYER_NORM, activation="gelu", residual="parallel"),
        {"rope": Rope(share=0.25), "qkv_bias": True, "norm_eps": 1e-5, "num_kv_heads": 8},
    ),
    "opt-125m": (
        OPT,
        Block(**LAYER_NORM, activation="relu", learned_positions=True, position_offset=2),
        {"rope": None, "out_bias": True, "pad_id": 1, "bos_id": 2, "norm_eps": 1e-5},
    ),
    "falcon-7b": (
        FALCON,
        Block(**LAYER_NORM, activation="gelu", residual="parallel_shared"),
        {"num_kv_heads": 1, "intermediate_size": 18176, "max_length": 2048, "qkv_bias": False},
    ),
    "falcon-40b": (
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 128, "hidden_size": 8192},
        Block(**LAYER_NORM, activation="gelu", residual="parallel"),
        {"num_kv_heads": 8, "head_dim": 64},
    ),
    "Mixtral-8x7B": (MIXTRAL, Block(experts=Experts(8, 2)), {"rope": Rope(1e6), "intermediate_size": 14336}),
    "Qwen3-30B-A3B": (
        QWEN3_MOE,
        Block(experts=Experts(128, 8)),
        {"intermediate_size": 768, "qk_norm": True, "windows": ()},
    ),
    "OLMo-2-7B": (OLMO2, Block(norm_place="post", qk_norm="all_heads"), {"qk_norm": True, "rope": Rope(5e5)}),
    "SmolLM3-3B": (SMOLLM3, Block(), {"ropes": (*(Rope(5e6),) * 3, None) * 9, "windows": (), "tie_embeddings": True}),
    "granite-3": (
        GRANITE,
        Block(embedding_scale=12.0, query_scale=1 / 64, residual_scale=0.22, logits_scale=1 / 49),
        {"rope": Rope(5e6), "tie_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_read_of_a_published_config_and_that_it_comes_back(name):
    values, block, fields = PUBLISHED[name]
    config = models.config_from_hf(values)
    assert config.block == block
    assert {field: getattr(config, field) for field in fields} == fields
    assert models.config_from_hf(models.config_to_hf(config)) == config


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("word_embed_proj_dim", OPT, {"word_embed_proj_dim": 512}),
    ("do_layer_norm_before", OPT, {"do_layer_norm_before": False}),
    ("_remove_final_layer_norm", OPT, {"_remove_final_layer_norm": True}),
    ("layer_norm_elementwise_affine", OPT, {"layer_norm_elementwise_affine": False}),
    ("scale_attn_by_inverse_layer_idx", GPT2, {"scale_attn_by_inverse_layer_idx": True}),
    ("scale_attn_weights", GPT2, {"scale_attn_weights": False}),
    ("add_cross_attention", GPT2, {"add_cross_attention": True}),
    ("alibi", FALCON, {"alibi": True}),
    ("parallel_attn", FALCON, {"new_decoder_architecture": True, "parallel_attn": False}),
    ("auto_map", FALCON, {"auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"}}),
    ("auto_map", PHI3, {"auto_map": {"AutoModelForCausalLM": "modeling_own.Phi3ForCausalLM"}}),
    ("partial_rotary_factor", OLMO2, {"partial_rotary_factor": 0.5}),
    ("use_bidirectional_attention", GEMMA3, {"use_bidirectional_attention": True}),
    ("attn_logit_softcapping", GEMMA3, {"attn_logit_softcapping": 50.0}),
    ("mlp_only_layers", QWEN3_MOE, {"mlp_only_layers": [0]}),
    ("decoder_sparse_step", QWEN3_MOE, {"decoder_sparse_step": 2}),
    ("hidden_act", MIXTRAL, {"hidden_act": "quick_gelu"}),
    ("quantization_config", MIXTRAL, {"quantization_config": {"bits": 4}}),
    ("clip_qkv", OLMO2, {"clip_qkv": 8.0}),
    ("no_rope_layers", SMOLLM3, {"no_rope_layers": [1, 0]}),
    ("rope_parameters", OLMO2, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ("rope_parameters", GEMMA3, {"rope_parameters": {"rope_type": "default"}}),
    ("beta_fast", PHI3, {"rope_scaling": PHI3["rope_scaling"] | {"type": "longrope", "beta_fast": 32}}),
    ("short_factor", PHI3, {"rope_scaling": {"type": "longrope", "long_factor": LONG}}),
    ("short_factors", PHI3, {"rope_scaling": PHI3["rope_scaling"] | {"short_factor": SHORT[:-1]}}),
    ("architectures", GPT2, {"architectures": ["GPT2DoubleHeadsModel"]}),
    ("model_type", GEMMA3, {"model_type": "gemma3"}),
]


@pytest.mark.parametrize(("match", "values", "changes"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(match, values, changes):
    models.config_from_hf(values)
    with pytest.raises(ValueError, match=match):
        models.config_from_hf(values | changes)


def test_a_config_that_its_family_cannot_express_is_refused():
    for values in (GPT2, OPT, OLMO2, MIXTRAL):
        config = models.config_from_hf(values)
        other = models.config_from_hf(GEMMA2).block
        with pytest.raises(ValueError, match=f"family '{config.family}' cannot express"):
            models.config_to_hf(models.Config(**{**vars(config), "block": other}))

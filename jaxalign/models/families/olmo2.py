"""OLMo 2: Llama with norms after attention and MLP in place of before, and norms over all heads of queries and keys."""

from jaxalign.models.block import Block
from jaxalign.models.families.rules import OUT_BIAS, PREFIX_LAYER, QK_NORM, QKV_BIAS, Family, linear, scale

OLMO2 = Family(
    "Olmo2",
    (
        linear("attention/qkv", *(f"{PREFIX_LAYER}self_attn.{name}_proj" for name in "qkv"), sizes="qkv"),
        linear("attention/out", PREFIX_LAYER + "self_attn.o_proj"),
        scale("attention_post_norm", PREFIX_LAYER + "post_attention_layernorm"),
        linear("gate_up", *(f"{PREFIX_LAYER}mlp.{name}_proj" for name in ("gate", "up")), sizes="gate_up"),
        linear("down", PREFIX_LAYER + "mlp.down_proj"),
        scale("mlp_post_norm", PREFIX_LAYER + "post_feedforward_layernorm"),
    ),
    optional=(("qkv_bias", QKV_BIAS), ("out_bias", OUT_BIAS), ("qk_norm", QK_NORM)),
    options={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "qk_norm": True},
    defaults={"rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
    block=lambda values: Block(norm_place="post", qk_norm="all_heads"),
)

"""Model families as data: a file for each, and the dict that names them."""

from jaxalign.models.families.falcon import FALCON
from jaxalign.models.families.gemma2 import GEMMA2
from jaxalign.models.families.gemma3 import GEMMA3
from jaxalign.models.families.gpt2 import GPT2
from jaxalign.models.families.gpt_neox import GPT_NEOX
from jaxalign.models.families.granite import GRANITE
from jaxalign.models.families.layouts import packed, stack_experts, unpacked, unstack_experts
from jaxalign.models.families.llama import LLAMA
from jaxalign.models.families.mistral import MISTRAL
from jaxalign.models.families.mixtral import MIXTRAL
from jaxalign.models.families.olmo2 import OLMO2
from jaxalign.models.families.opt import OPT
from jaxalign.models.families.phi3 import PHI3
from jaxalign.models.families.qwen2 import QWEN2
from jaxalign.models.families.qwen3 import QWEN3
from jaxalign.models.families.qwen3_moe import QWEN3_MOE
from jaxalign.models.families.rules import (
    Family,
    Rule,
    fuse,
    fused_shape,
    is_harmless,
    split_sizes,
    unfuse,
    write_out,
)
from jaxalign.models.families.smollm3 import SMOLLM3

__all__ = [
    "FAMILIES",
    "Family",
    "Rule",
    "fuse",
    "fused_shape",
    "is_harmless",
    "packed",
    "split_sizes",
    "stack_experts",
    "unfuse",
    "unpacked",
    "unstack_experts",
    "write_out",
]

FAMILIES: dict[str, Family] = {
    "falcon": FALCON,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "granite": GRANITE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
}
"""model_type of a config.json -> the family."""

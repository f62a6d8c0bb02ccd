"""Model families as data: a file for each, and the dict that names them."""

from jaxalign.models.families.llama import LLAMA
from jaxalign.models.families.mistral import MISTRAL
from jaxalign.models.families.qwen2 import QWEN2
from jaxalign.models.families.qwen3 import QWEN3
from jaxalign.models.families.rules import Family, Rule, fuse, fused_shape, is_harmless, split_sizes, unfuse, write_out

__all__ = ["FAMILIES", "Family", "Rule", "fuse", "fused_shape", "is_harmless", "split_sizes", "unfuse", "write_out"]

FAMILIES: dict[str, Family] = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
"""model_type of a config.json -> the family."""

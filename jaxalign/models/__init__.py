"""Language models: one decoder-only transformer for all families, its cache and heads, and Hugging Face folders."""

from jaxalign.models import lora
from jaxalign.models.block import Block, Experts, Rope
from jaxalign.models.cache import Cache
from jaxalign.models.config import Config, Distribution, Follower, Head
from jaxalign.models.hf.beside import load_beside
from jaxalign.models.hf.config import config_from_hf, config_to_hf
from jaxalign.models.hf.folders import load, read_config, save
from jaxalign.models.hf.peft import load_adapter, save_adapter
from jaxalign.models.hf.sources import source_folders, split_source
from jaxalign.models.hf.tokenizers import tokenizer
from jaxalign.models.language_model import LanguageModel, ModelOutput, with_head
from jaxalign.models.log_prob import chunked, response_hidden, token_log_prob
from jaxalign.models.lora import Lora
from jaxalign.models.pooling import Pooled, last_read_index, pooled, read_index
from jaxalign.models.tiny_model import tiny
from jaxalign.models.vocabulary import (
    check_ends_kept,
    check_rows,
    check_tokens,
    cut_vocabulary,
    match_vocabulary,
    with_eos,
)

__all__ = [
    "Block",
    "Cache",
    "Config",
    "Distribution",
    "Experts",
    "Follower",
    "Head",
    "LanguageModel",
    "Lora",
    "ModelOutput",
    "Pooled",
    "Rope",
    "check_ends_kept",
    "check_rows",
    "check_tokens",
    "chunked",
    "config_from_hf",
    "config_to_hf",
    "cut_vocabulary",
    "last_read_index",
    "load",
    "load_adapter",
    "load_beside",
    "lora",
    "match_vocabulary",
    "pooled",
    "read_config",
    "read_index",
    "response_hidden",
    "save",
    "save_adapter",
    "source_folders",
    "split_source",
    "tiny",
    "token_log_prob",
    "tokenizer",
    "with_eos",
    "with_head",
]

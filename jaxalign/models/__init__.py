"""Language models: one decoder-only transformer for all families, its cache and heads, and Hugging Face folders."""

from jaxalign.models.config import Config, Head, Rope
from jaxalign.models.language_model import Cache, LanguageModel, ModelOutput
from jaxalign.models.log_prob import chunked, token_log_prob

__all__ = ["Cache", "Config", "Head", "LanguageModel", "ModelOutput", "Rope", "chunked", "token_log_prob"]

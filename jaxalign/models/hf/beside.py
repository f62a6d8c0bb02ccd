"""Models that read the tokens of another, from their folders."""

from __future__ import annotations

import pathlib
from typing import Any

from jax.typing import DTypeLike

from jaxalign.models import sharding
from jaxalign.models.hf.folders import load
from jaxalign.models.hf.tokenizers import tokenizer as load_tokenizer
from jaxalign.models.language_model import LanguageModel
from jaxalign.models.vocabulary import check_tokens, match_vocabulary
from jaxalign.types import Params


def load_beside(
    path: str | pathlib.Path,
    lm: LanguageModel,
    tokenizer: Any,
    *,
    name: str = "critic",
    dtype: DTypeLike = "float32",
) -> tuple[LanguageModel, Params]:
    """Loads a model that reads the tokens of another, over the other's vocabulary.

    Args:
      path: as `load` reads it.
      lm: the base, which keeps its ids; the loaded model lies on its mesh.
      tokenizer: the base's.
      name: the loaded model's, for messages.
      dtype: of its parameters.

    Returns:
      The model and its parameters, with as many ids as the base.

    Raises:
      ValueError: as `load`, `check_tokens` and `match_vocabulary`.
    """
    check_tokens(tokenizer, load_tokenizer(path), name=name)
    loaded, params = load(path, dtype=dtype, mesh=lm.mesh)
    if loaded.vocab_size == lm.vocab_size:
        return loaded, params
    loaded, params = match_vocabulary((lm, {}), (loaded, params), names=("base", name), keep_first=True)[1]
    return loaded, params if lm.mesh is None else sharding.shard(params, lm.mesh)

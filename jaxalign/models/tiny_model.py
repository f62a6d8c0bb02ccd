"""A small random model, for trying things."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from jaxalign.models.config import Config, Head
from jaxalign.models.language_model import LanguageModel
from jaxalign.types import Params

SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 64}


class Vocabulary(Protocol):
    """What is read of a tokenizer."""

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text."""

    @property
    def pad_token_id(self) -> int | None:
        """The id of padding."""

    def __len__(self) -> int:
        """The number of ids."""


def tiny(
    vocabulary: int | Vocabulary = 64,
    *,
    head: Head | str | None = None,
    seed: int = 0,
    dtype: DTypeLike = "float32",
    **fields: Any,
) -> tuple[LanguageModel, Params]:
    """Makes a language model of one layer with random parameters, for trying things without a folder.

    Args:
      vocabulary: the number of tokens V, of which 0 ends a response; or a tokenizer, whose ids and EOS it takes.
      head: "reward", "value" or "q", or a `models.Head`; None for a language model.
      seed: of the parameters.
      dtype: of the model.
      fields: further or other fields of `models.Config`, such as num_layers=2; max_length is 256 [tokens].

    Returns:
      (model, params), as `models.load` gives them.

    Raises:
      ValueError: a field outside its range.
    """
    if isinstance(vocabulary, int):
        own: dict[str, Any] = {"vocab_size": vocabulary, "eos_ids": (0,)}
    else:
        end = vocabulary.eos_token_id
        own = {"vocab_size": len(vocabulary), "eos_ids": () if end is None else (end,)}
        own["pad_id"] = vocabulary.pad_token_id
    given = Head(head) if isinstance(head, str) else head  # type: ignore[arg-type]  # which checks its name
    lm = LanguageModel(Config(**{"max_length": 256, **SHAPE, **own, "head": given, **fields}), dtype)
    return lm, lm.init(jax.random.key(seed))

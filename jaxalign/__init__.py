"""Inference-time alignment of language models as pure, jit-able JAX functions.

`import jaxalign` loads nothing: a submodule, type or function named here is imported when it is first used. The three
types `Policy`, `Critic` and `Reward` and the functions of `policies`, `critics`, `rewards` and `decoding` are the
library; docs/index.md says what the other submodules are for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from jaxalign._version import __version__

if TYPE_CHECKING:
    from jaxalign import (
        advantages,
        bilevel,
        critics,
        data,
        decoding,
        evaluation,
        gibbs,
        infalign,
        losses,
        mdp,
        metrics,
        models,
        policies,
        pools,
        prompts,
        rewards,
        shaping,
        testing,
        text,
        training,
        tree,
        types,
        worlds,
    )
    from jaxalign.decoding import best_of_n, log_prob, sample
    from jaxalign.models import load, save, tokenizer
    from jaxalign.policies import language_model, tilt
    from jaxalign.prompts import prompt_batch
    from jaxalign.types import (
        KL,
        CheckedReward,
        Completions,
        Critic,
        Decoded,
        LanguageModel,
        Policy,
        Reward,
        StepOutput,
        TextReward,
        TokenBatch,
    )

__all__ = [
    "KL",
    "CheckedReward",
    "Completions",
    "Critic",
    "Decoded",
    "LanguageModel",
    "Policy",
    "Reward",
    "StepOutput",
    "TextReward",
    "TokenBatch",
    "__version__",
    "advantages",
    "best_of_n",
    "bilevel",
    "critics",
    "data",
    "decoding",
    "evaluation",
    "gibbs",
    "infalign",
    "language_model",
    "load",
    "log_prob",
    "losses",
    "mdp",
    "metrics",
    "models",
    "policies",
    "pools",
    "prompt_batch",
    "prompts",
    "rewards",
    "sample",
    "save",
    "shaping",
    "testing",
    "text",
    "tilt",
    "tokenizer",
    "training",
    "tree",
    "types",
    "worlds",
]

_FUNCTIONS = {  # name -> its submodule
    "best_of_n": "decoding",
    "language_model": "policies",
    "load": "models",
    "log_prob": "decoding",
    "prompt_batch": "prompts",
    "sample": "decoding",
    "save": "models",
    "tilt": "policies",
    "tokenizer": "models",
}


if not TYPE_CHECKING:  # so that a checker reports a misspelt name

    def __getattr__(name: str) -> object:
        """Imports what `__all__` names, at its first use (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")
        if name in _FUNCTIONS or name[0].isupper():
            found = getattr(importlib.import_module(f"jaxalign.{_FUNCTIONS.get(name, 'types')}"), name)
        else:
            found = importlib.import_module(f"jaxalign.{name}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

"""The files of a world: rows of texts, preferences and prompts, and a small model for its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxalign import models
from jaxalign.worlds import opinions, sentiment, summaries

__all__ = [
    "everyday_rows",
    "small_llama",
    "world_rows",
]

Task = Literal["opinions", "summaries"]

SYSTEM = "Answer in one short sentence."
"""The system turn of everyday requests."""


def world_rows(task: Task, *, texts: int, pairs: int, held_out: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """Makes the rows of each file of a task, by the file's name.

    Args:
      task: "opinions" or "summaries".
      texts, pairs: number of texts of the base and of preference pairs.
      held_out: number of prompts to decode; as many at most under drift.
      seed: of everything.

    Returns:
      {"texts", "pairs", "prompts", "held_out", "drift"}: rows for JSON lines. No prompt of held_out is in the first
      three, no topic of drift in any of the others.
    """
    if task == "opinions":
        every = opinions.prompts()
        kept, held = [p for i, p in enumerate(every) if i % 5], every[::5]
        drift = opinions.prompts("held_out")
        world: Any = opinions
    else:
        kept = summaries.items(3_000, seed=seed)
        known = set(kept)
        held = [p for p in summaries.items(2 * held_out, seed=seed + 1) if p not in known]
        drift = summaries.items(held_out, seed=seed, split="held_out")
        world = summaries
    return {
        "texts": world.corpus(texts, seed=seed, prompt_pool=kept),
        "pairs": world.preferences(pairs, seed=seed, prompt_pool=kept),
        "prompts": _prompts(kept, len(kept)),
        "held_out": _prompts(held, held_out),
        "drift": _prompts(drift, held_out),
    }


def everyday_rows(*, prompts: int, held_out: int) -> dict[str, list[dict[str, list[dict[str, str]]]]]:
    """Makes the rows of the prompts of `worlds.sentiment`, by the file's name.

    Args:
      prompts: of the 160 to train on, taken evenly; 0: all.
      held_out: of the 40 to decode, taken evenly; 0: all.

    Returns:
      {"prompts", "held_out"}: rows of messages for JSON lines, a system turn that asks for short answers and the
      request.

    Raises:
      ValueError: more than there are.
    """
    found = {}
    for name, n, pool in (
        ("prompts", prompts, sentiment.prompts()),
        ("held_out", held_out, sentiment.prompts("held_out")),
    ):
        if not 0 <= n <= len(pool):
            raise ValueError(f"{name}: expected at most {len(pool)} requests, found {n}")
        taken = [row["prompt"] for row in _prompts(pool, n or len(pool))]
        system = {"role": "system", "content": SYSTEM}
        found[name] = [{"messages": [system, {"role": "user", "content": text}]} for text in taken]
    return found


def _prompts(pool: Sequence[str], n: int) -> list[dict[str, str]]:
    """n prompts taken evenly from the pool (from its topics, that is), each once at most."""
    n = min(n, len(pool))
    return [{"prompt": pool[i * len(pool) // n]} for i in range(n)]


def small_llama(vocabulary: Any, *, layers: int, width: int) -> models.Config:
    """A small Llama of four heads for the words of a tokenizer.

    Args:
      vocabulary: the tokenizer.
      layers: number of layers.
      width: hidden size, a multiple of 8.

    Returns:
      The model's Config, with 128 positions and tied embeddings.
    """
    return models.Config(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=width // 4,
        intermediate_size=3 * width,
        max_length=128,
        eos_ids=(vocabulary.eos_token_id,),
        tie_embeddings=True,
    )

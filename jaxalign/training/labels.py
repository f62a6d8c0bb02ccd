"""Preference pairs between a base's own samples, as a noisy reader of their rewards would label them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.tokens import Text
from jaxalign.training import rollouts


def noisy_pairs(
    found: Sequence[rollouts.Rollout],
    sources: Sequence[Text],
    tokenizer: Any,
    ends: Sequence[int],
    *,
    noise: float,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draws preferences between neighbouring samples of each prompt: the 1st and 2nd, the 3rd and 4th, and so on.

    P(first chosen) = sigmoid((r1 − r2) / noise), Bradley and Terry's model.

    Args:
      found: all samples, with the rewards that the reader judges by.
      sources: prompts as they were given, by the samples' `row`.
      tokenizer: of the samples.
      ends: the ids that end a response.
      noise: difference of rewards that a reader's doubt is worth, > 0.
      seed: of all draws.

    Returns:
      (rows "prompt", "chosen", "rejected", and for each side whether the limit cut it; figures: pairs, pairs left out
      for an empty response or one text twice, means of the reward and of its spread within prompts, the share of pairs
      in which the better response is chosen and the share of samples that were cut).

    Raises:
      ValueError: no pair is left.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    empty = same = better = compared = 0
    groups = rollouts.by_prompt(list(found)).items()
    for prompt, samples in groups:
        for first, second in zip(samples[::2], samples[1::2], strict=False):
            # One draw for each pair, also one that is left out: rows do not depend on each other.
            likes_first = rng.random() < 1 / (1 + np.exp(-np.clip((first.reward - second.reward) / noise, -500, 500)))
            chosen, rejected = (first, second) if likes_first else (second, first)
            texts = [tokenizer.decode(side.response, skip_special_tokens=True) for side in (chosen, rejected)]
            if not all(text.strip() for text in texts):
                empty += 1
                continue
            if texts[0].strip() == texts[1].strip():
                same += 1
                continue
            compared += chosen.reward != rejected.reward
            better += chosen.reward > rejected.reward
            cut = [side.response[-1] not in ends for side in (chosen, rejected)]
            row = {"prompt": sources[prompt], "chosen": texts[0], "rejected": texts[1]}
            rows.append(row | {"chosen_truncated": cut[0], "rejected_truncated": cut[1]})
    if not rows:
        raise ValueError(f"samples: expected pairs of different texts, found {empty} with an empty one, {same} of one")
    rewards = np.asarray([row.reward for row in found])
    within = [np.std([sample.reward for sample in samples]) for _, samples in groups]
    return rows, {
        "pairs": len(rows),
        "empty_pairs": empty,
        "same_pairs": same,
        "reward": float(rewards.mean()),
        "mean_spread_within_prompts": float(np.mean(within)),
        "better_chosen": better / compared if compared else None,
        "truncated": float(np.mean([row.response[-1] not in ends for row in found])),
    }

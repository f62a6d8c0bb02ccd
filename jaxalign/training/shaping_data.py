"""Options and rows of the training of Stackelberg leaders: each row is a prompt with all its roll-outs."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np

from jaxalign.data import encoded, preferences
from jaxalign.training import job, rollouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapingOptions(rollouts.RolloutOptions):
    """Options of a job that trains a leader or a threshold."""

    leader: Literal["reward_model", "network"] = "reward_model"
    """What is trained: a transformer's reward, or a shaping function of the utility."""
    amortise: bool = False
    """Train a head for the threshold in place of a leader."""
    bound: float = 3.0
    """Bound B of the reward [units of reward]."""
    beta: float = 1.0
    """KL weight of the follower [units of reward per nat]."""
    samples: int = 16
    """Roll-outs per prompt."""
    batch_size: int = 8
    """Prompts per optimizer step, each with all its roll-outs."""


class PromptGroup(NamedTuple):
    """A prompt and all its roll-outs."""

    prompt: list[int]
    """Token ids, by which rows are split."""
    responses: list[list[int]]
    """Token ids of each roll-out."""
    utility: list[float]
    """True utility of each roll-out."""


def check_shaping_options(config: ShapingOptions) -> None:
    """ValueErrors that name the option."""
    rollouts.check(config)
    for name in ("bound", "beta"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected a finite value > 0, found {getattr(config, name)}")
    if config.samples < 2:
        raise ValueError(f"samples: expected at least 2 roll-outs to weigh against each other, found {config.samples}")


def prompt_groups(found: list[rollouts.Rollout]) -> list[PromptGroup]:
    """One row per prompt."""
    return [
        PromptGroup(rows[0].prompt, [row.response for row in rows], [row.reward for row in rows])
        for rows in rollouts.by_prompt(found).values()
    ]


def collate_groups(config: ShapingOptions, rows: list[PromptGroup]) -> dict[str, np.ndarray]:
    """{"tokens", "mask", "loss_mask" [b,n,L], "utility" [b,n]}, right-padded."""
    texts = [encoded.TextTokens(row.prompt, r, "roll-out") for row in rows for r in row.responses]
    length = job.row_length(config, [len(text.prompt) + len(text.response) for text in texts])
    flat = preferences.pad_texts(texts, length=length)
    each = {name: values.reshape(len(rows), -1, *values.shape[1:]) for name, values in flat.items()}
    return each | {"utility": np.asarray([row.utility for row in rows], np.float32)}


def collate_prompts(config: ShapingOptions, rows: list[PromptGroup]) -> dict[str, np.ndarray]:
    """{"tokens", "mask" [b,P], "utility" [b,n]}: the prompts alone, right-padded."""
    length = job.row_length(config, [len(row.prompt) for row in rows])
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.prompt)], mask[i, : len(row.prompt)] = row.prompt, True
    return {"tokens": tokens, "mask": mask, "utility": np.asarray([row.utility for row in rows], np.float32)}

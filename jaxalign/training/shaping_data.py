"""Options and rows of the training of Stackelberg leaders: each row is a prompt with all its roll-outs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxalign import models
from jaxalign._checks import check_count
from jaxalign.data import encoded, preferences
from jaxalign.training import job, rollouts
from jaxalign.training.options import RolloutOptions, check_finite, check_rollout_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapingOptions:
    """What a leader of Stackelberg shaping is."""

    leader: Literal["reward_model", "network"] = "reward_model"
    """What is trained: a transformer's reward, or a shaping function of the utility."""
    follower: Literal["closed_form", "tokens", "smc", "trained"] = "closed_form"
    """What answers a reward model that leads: the closed form on roll-outs; the base tilted by tokens with the reward
    of the partial text; particles of that tilt; or a policy over the roll-outs that trains a few steps."""
    candidates: int = 16
    """Next tokens that the leader's reward weighs, of followers tokens and smc."""
    compare_raw: bool = False
    """With followers tokens and smc: decode the held-out prompts once more where the true utility itself is paid on the
    partial text at each token, as it is. --reward then scores every candidate of every token."""
    follower_steps: int = 16
    """Gradient steps of the follower trained."""
    follower_step_size: float = 0.5
    """Size of each [nats per unit of reward]."""
    amortise: bool = False
    """Train a head for the threshold in place of a leader."""
    bound: float = 3.0
    """Bound B of the reward [units of reward]."""
    beta: float = 1.0
    """KL weight of the follower [units of reward per nat]."""


class PromptGroup(NamedTuple):
    """A prompt and all its roll-outs."""

    prompt: list[int]
    """Token ids, by which rows are split."""
    responses: list[list[int]]
    """Token ids of each roll-out."""
    utility: list[float]
    """True utility of each roll-out."""
    row: int = 0
    """Row of the prompt in its file."""


def check_shaping_options(options: ShapingOptions, rolled: RolloutOptions, adapter: models.Lora | None = None) -> None:
    """ValueErrors that name the option; rolled: of the roll-outs that are weighed; adapter: that is trained."""
    check_rollout_options(rolled)
    check_finite(options, "bound", "beta", above=True)
    check_finite(options, "follower_step_size", above=True)
    for name in ("candidates", "follower_steps"):
        check_count(name, getattr(options, name), least=1)
    if options.follower != "closed_form" and (options.amortise or options.leader != "reward_model"):
        raise ValueError(
            f"follower: expected closed_form for a leader that is no reward_model, found {options.follower}"
        )
    if adapter is not None and (options.amortise or options.leader != "reward_model"):
        raise ValueError(f"lora_rank: expected 0 for a leader that is no reward_model, found {adapter.rank}")
    if options.compare_raw and options.follower not in ("tokens", "smc"):
        raise ValueError(f"compare_raw: expected with --follower tokens or smc, found {options.follower}")
    if rolled.samples < 2:
        raise ValueError(f"samples: expected at least 2 roll-outs to weigh against each other, found {rolled.samples}")


def check_held_out(prompts: Sequence[encoded.Prompt], *, validation: float, seed: int) -> None:
    """Checks, before anything is drawn, that there will be prompts to measure on.

    Args:
      prompts: all of them.
      validation: share that is held out.
      seed: of the split.

    Raises:
      ValueError: fewer than two held-out prompts.
    """
    rows = [PromptGroup(prompt.tokens, [], []) for prompt in prompts]
    try:
        held_out = preferences.split_by_prompt(rows, fraction=validation, seed=seed)[1] if validation else []
    except ValueError as error:
        raise ValueError(f"validation: {str(error).removeprefix('fraction: ')}") from error
    if len(held_out) < 2:
        raise ValueError(f"validation: expected at least 2 held-out prompts, found {len(held_out)} of {len(rows)}")


def prompt_groups(found: list[rollouts.Rollout]) -> list[PromptGroup]:
    """Makes a row of each prompt from all its roll-outs."""
    return [
        PromptGroup(rows[0].prompt, [row.response for row in rows], [row.reward for row in rows], rows[0].row)
        for rows in rollouts.by_prompt(found).values()
    ]


def collate_groups(
    rows: list[PromptGroup], max_length: int, others: Sequence[PromptGroup] = ()
) -> dict[str, np.ndarray]:
    """Pads b prompts with all their roll-outs, at most `max_length` tokens each, to a length that holds the others too.

    Returns:
      {"tokens", "mask", "loss_mask" [b,n,L], "utility" [b,n]}, right-padded.
    """
    texts = [encoded.TextTokens(row.prompt, r, "roll-out") for row in rows for r in row.responses]
    lengths = [len(row.prompt) + len(response) for row in (*rows, *others) for response in row.responses]
    length = job.row_length(lengths, max_length)
    flat = preferences.pad_texts(texts, length=length)
    each = {name: values.reshape(len(rows), -1, *values.shape[1:]) for name, values in flat.items()}
    return each | {"utility": np.asarray([row.utility for row in rows], np.float32)}


def collate_prompts(
    rows: list[PromptGroup], max_length: int, others: Sequence[PromptGroup] = ()
) -> dict[str, np.ndarray]:
    """Pads b prompts alone, at most `max_length` tokens each, to a length that holds the others too.

    Returns:
      {"tokens", "mask" [b,P], "utility" [b,n], "index" [b]}, right-padded.
    """
    length = job.row_length([len(row.prompt) for row in (*rows, *others)], max_length)
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.prompt)], mask[i, : len(row.prompt)] = row.prompt, True
    utility, index = np.asarray([row.utility for row in rows], np.float32), [row.row for row in rows]
    return {"tokens": tokens, "mask": mask, "utility": utility, "index": np.asarray(index, np.int32)}

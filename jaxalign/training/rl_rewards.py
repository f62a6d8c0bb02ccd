"""The reward of train.rl: a model or a program, calibrated, transformed and shaped as the options say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, infalign, rewards, shaping
from jaxalign.data import Prompt
from jaxalign.data.text_options import TextOptions
from jaxalign.prompts import prompt_index
from jaxalign.training import dry_run, job, rollouts, tables
from jaxalign.training.rl_options import RewardOptions
from jaxalign.types import Array, CheckedReward, Params, Reward, TokenBatch


class Composed(NamedTuple):
    """The reward of a policy, composed as its options say."""

    reward: Reward
    """What is maximised."""
    params: Params
    """Its parameters."""
    raw: Reward
    """The reward before any map."""
    raw_params: Params
    """Its parameters."""


def inputs(options: RewardOptions) -> list[str]:
    """The files and folders that the reward reads."""
    return [*rewards.reward_inputs(options.reward), options.calibration]


def compose(
    options: RewardOptions,
    started: job.StartedModel,
    prompts: Sequence[Prompt],
    *,
    base: str,
    dtype: str,
    max_new_tokens: int,
    text: TextOptions | None = None,
) -> Composed:
    """Composes the reward of a policy.

    A prompt that comes again in a batch of `rl.collate_prompts` has its row and a multiple of the prompts' count as
    index, which tells its draws apart: the rewards here read the row.

    Args:
      options: the reward and its maps.
      started: the model that is aligned.
      prompts: all of them, which a calibration table must be of.
      base: folder that the model came from.
      dtype: type that reward models compute in.
      max_new_tokens: limit of a response.
      text: how the prompts became tokens.

    Returns:
      The Reward with its parameters, and the one before any map.

    Raises:
      ValueError: a table made with anything else than this run's model, reward, tokenizer, limit and prompts.
    """
    if dry_run.is_abstract(started.params):
        nothing, params = rollouts.reward_shapes(options.reward, dtype=dtype)
        return Composed(nothing, params, nothing, params)
    sources, count = [prompt.source for prompt in prompts], len(prompts)
    raw = rollouts.open_reward(
        options.reward,
        started.lm,
        started.tokenizer,
        dtype=dtype,
        sources=sources,
        text=text,
        between_programs=_hosts.count() > 1,  # the rows of an iteration lie across the processes
    )
    table = None
    if options.calibration:
        ids = [prompt.tokens for prompt in prompts]
        expected = tables.made_with(
            base, options.reward, started.tokenizer, ids, max_new_tokens=max_new_tokens, dtype=dtype
        )
        table = tables.read(options.calibration, expected, rows=count).reward
    reward, params = _mapped(options, *raw, table)
    return Composed(_by_row(reward, count), params, _by_row(raw[0], count), raw[1])


def _by_row(reward: Reward, count: int) -> Reward:
    def read(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        return reward(params, tokens, mask, prompt_length, index % count)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        if isinstance(reward, CheckedReward) and reward.check is not None:
            reward.check(params, prompts._replace(index=prompt_index(prompts) % count), max_new_tokens)

    return CheckedReward(read, check, getattr(reward, "vocab_size", None), on_host=rewards.on_host(reward))


def _mapped(options: RewardOptions, raw: Reward, raw_params: Params, table: np.ndarray | None) -> tuple[Reward, Params]:
    """The reward after its maps; table: rewards [prompts,K] of the base's samples, where it is calibrated."""
    transform = infalign.parse_transform(options.transform, beta=options.beta) if options.transform else None
    if table is None:
        if transform is None:
            return raw, raw_params
        squashed = rewards.map_reward(raw, lambda _, r, index: transform(1 / (1 + jnp.exp(-r))))
        return squashed, {"reward": raw_params, "map": {}}
    params: Params = {"reward": raw_params, "map": {"table": jnp.asarray(table)}}
    if transform is None and options.bound:
        return _shaped(options, raw, raw_params, table)
    smooth = options.transform == "log"
    width = options.width or None
    reward = rewards.calibrated(raw, transform=transform, width=width, smooth=smooth)
    if options.bound:
        # The base's own samples through the same maps: a sample of the table against its table.
        own = infalign.calibrate(table, reference=table, width=width, smooth=smooth)
        assert transform is not None
        return _shaped(options, reward, params, np.asarray(transform(own)))
    return reward, params


def _shaped(options: RewardOptions, reward: Reward, params: Params, base: np.ndarray) -> tuple[Reward, Params]:
    """Thresholds from the rewards [prompts,K] of base samples."""
    threshold = shaping.optimal_threshold(jnp.asarray(base), gain=options.bound / options.beta)
    return rewards.shaped(reward), {"reward": params, "map": {"threshold": threshold, "bound": options.bound}}

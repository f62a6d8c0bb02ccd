"""The reward of train.rl: a model or a program, calibrated, transformed and shaped as the options say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign import infalign, rewards, shaping
from jaxalign.data import Prompt
from jaxalign.prompts import prompt_index
from jaxalign.training import job, rollouts, tables
from jaxalign.types import Array, CheckedReward, Params, Reward, TokenBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a policy is aligned with."""

    reward: str
    """Folder of a reward model over the model's vocabulary, or MODULE:FUNCTION, a program f(prompts, responses) ->
    numbers on lists of texts; or a weighted sum of such, "DIR - 0.1 * MODULE:FUNCTION"."""
    max_new_tokens: int = 128
    """Limit of a response [tokens], its EOS included; one without EOS is scored as it stands."""
    calibration: str = ""
    """Folder of train.calibrate: rewards become their quantile among the base's own for the prompt, in [0, 1]."""
    transform: str = ""
    """Map of the quantile: identity, log, exp:A, bon:N, won:N, or the optimum for best-of-N and worst-of-N at --beta,
    bon_fp:N and won_fp:N. Without --calibration the map is of the sigmoid of the reward."""
    width: float = 0.0
    """Width of a smoothed calibration [units of reward]; 0: ranks."""
    bound: float = 0.0
    """Bound B of a Stackelberg threshold reward, B·1[r > m(x)], with m from the calibration's samples at gain B/beta;
    0: none. With --transform, of the transformed reward."""


class Composed(NamedTuple):
    """reward, params: what is maximised; raw, raw_params: the reward before any map."""

    reward: Reward
    params: Params
    raw: Reward
    raw_params: Params


def check(config: Any) -> None:
    """ValueErrors that name the option."""
    for name in ("width", "bound"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected a finite value >= 0, found {getattr(config, name)}")
    if config.transform:
        solved = infalign.needs_beta(config.transform)
        if (solved or config.transform == "log") and not config.calibration:
            raise ValueError(f"transform: expected {config.transform} with --calibration, which gives it quantiles")
        if solved and config.target_kl:
            raise ValueError(f"transform: expected {config.transform}, solved for one beta, without --target-kl")
        infalign.check_increasing(infalign.parse_transform(config.transform, beta=config.beta))
    if config.width and config.bound and not config.transform:
        raise ValueError("width: expected with --transform: the threshold alone is on the reward itself")
    for name in ("width", "bound"):
        if getattr(config, name) and not config.calibration:
            raise ValueError(f"{name}: expected with --calibration, whose samples it needs")
    if config.bound and config.target_kl:
        raise ValueError("bound: expected without --target-kl: the threshold is solved for one beta")


def inputs(config: Any) -> list[str]:
    """The files and folders that the reward reads."""
    return [*rewards.reward_inputs(config.reward), config.calibration]


def build(config: Any, begin: job.Start, prompts: Sequence[Prompt]) -> Composed:
    """The composition; prompts: all of them, which a calibration table must be of. ValueErrors: a table made with
    anything else than this run's model, reward, tokenizer, limit and prompts.

    A prompt that comes again in a batch of `rl.collate` has its row and a multiple of the prompts' count as index,
    which tells its draws apart: the rewards here read the row."""
    found = _compose(config, begin, prompts)
    count = len(prompts)
    return found._replace(reward=_by_row(found.reward, count), raw=_by_row(found.raw, count))


def _by_row(reward: Reward, count: int) -> Reward:
    def read(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        return reward(params, tokens, mask, prompt_length, index % count)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        if isinstance(reward, CheckedReward) and reward.check is not None:
            reward.check(params, prompts._replace(index=prompt_index(prompts) % count), max_new_tokens)

    return CheckedReward(read, check, getattr(reward, "vocab_size", None), on_host=rewards.on_host(reward))


def _compose(config: Any, begin: job.Start, prompts: Sequence[Prompt]) -> Composed:
    sources = [prompt.source for prompt in prompts]
    raw, raw_params = rollouts.judge(config.reward, begin.lm, begin.tokenizer, dtype=config.dtype, sources=sources)
    transform = infalign.parse_transform(config.transform, beta=config.beta) if config.transform else None
    if not config.calibration:
        if transform is None:
            return Composed(raw, raw_params, raw, raw_params)
        squashed = rewards.map_reward(raw, lambda _, r, index: transform(1 / (1 + jnp.exp(-r))))
        return Composed(squashed, {"reward": raw_params, "map": {}}, raw, raw_params)
    base = config.model or config.architecture
    asked = [prompt.tokens for prompt in prompts]
    expected = tables.made_with(
        base, config.reward, begin.tokenizer, asked, max_new_tokens=config.max_new_tokens, dtype=config.dtype
    )
    table = tables.read(config.calibration, expected).reward
    params: Params = {"reward": raw_params, "map": {"table": jnp.asarray(table)}}
    if transform is None and config.bound:
        return Composed(*_shaped(config, raw, raw_params, table), raw, raw_params)
    smooth = config.transform == "log"
    width = config.width or None
    reward = rewards.calibrated(raw, transform=transform, width=width, smooth=smooth)
    if config.bound:
        # The base's own samples through the same maps: a sample of the table against its table.
        own = infalign.calibrate(table, reference=table, width=width, smooth=smooth)
        assert transform is not None
        return Composed(*_shaped(config, reward, params, np.asarray(transform(own))), raw, raw_params)
    return Composed(reward, params, raw, raw_params)


def _shaped(config: Any, reward: Reward, params: Params, base: np.ndarray) -> tuple[Reward, Params]:
    """Thresholds from the rewards [prompts,K] of base samples."""
    threshold = shaping.optimal_threshold(jnp.asarray(base), gain=config.bound / config.beta)
    return rewards.shaped(reward), {"reward": params, "map": {"threshold": threshold, "bound": config.bound}}

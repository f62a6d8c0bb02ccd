"""Sums and maps of Rewards. Each keeps a prefix (`PrefixReward`) where all its parts do, and comes out in at least
float32. What a part or a map of the user's returns is checked where it is traced (`values`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from jaxalign import infalign, shaping
from jaxalign._arrays import NEGATIVE, at_least_float32, is_supported, look_up
from jaxalign._builders import cached
from jaxalign._checks import ParamsError, fields_of, is_concrete, run_check
from jaxalign._parts import check_function_argument, check_reward_argument, described, takes
from jaxalign._tables import check_index
from jaxalign.pools import MemberPool
from jaxalign.prompts import prompt_index
from jaxalign.rewards import prefixes
from jaxalign.rewards.params import CalibratedParams, MapParams, PoolParams, ShapedParams, WeightedSumParams
from jaxalign.rewards.values import call_reward, check_values, compiled, on_host
from jaxalign.shapes import RewardValues, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.types import Array, ArrayLike, CheckedReward, HostCheck, Params, Reward, TokenBatch


class RewardMap(Protocol):
    """A function of rewards, elementwise: (map_params, reward [N], index [N]) -> [N]."""

    def __call__(self, params: Params, reward: RewardValues, index: TextIndex, /) -> RewardValues: ...


def _vocab_size(rewards: Sequence[Reward]) -> int | None:
    """The one vocabulary of several Rewards, None where none has one. ValueError where they differ."""
    sizes = sorted({size for size in (getattr(r, "vocab_size", None) for r in rewards) if size is not None})
    if len(sizes) > 1:
        raise ValueError(f"rewards: expected one vocabulary, found {sizes} tokens")
    return sizes[0] if sizes else None


def _check_of(reward: Reward) -> HostCheck | None:
    check: HostCheck | None = getattr(reward, "check", None)
    return check


def _sequence(rewards: Sequence[Reward]) -> tuple[Reward, ...]:
    """Rewards as a tuple, which has a hash. ValueError for what is no sequence of Rewards; the entry is named."""
    one = callable(rewards) or isinstance(rewards, str | Mapping) or hasattr(rewards, "_fields")
    if one or not isinstance(rewards, Iterable):
        raise ValueError(f"rewards: expected a sequence of Rewards, found {described(rewards)}")
    parts = tuple(rewards)
    for i, part in enumerate(parts):
        check_reward_argument(f"rewards[{i}]", part)
    return parts


def weighted_sum(rewards: Sequence[Reward]) -> Reward:
    """Builds the weighted sum of several rewards, Σ_i w_i·r_i; log 0 in one of weight other than 0 (`from_policy`) is
    log 0 in the sum.

    Args:
      rewards: m >= 1 Rewards over one vocabulary.

    Returns:
      A Reward with `WeightedSumParams`.

    Raises:
      ValueError: no rewards, what is no Reward (it is named, with the builder that makes one), or vocabularies that
        differ; when it is used, params or weights that are not one per
        reward, or weights that are not finite.
    """
    return _weighted_sum(_sequence(rewards))


@cached
def _weighted_sum(rewards: tuple[Reward, ...]) -> Reward:
    if not rewards:
        raise ValueError("rewards: expected at least one reward, found none")
    vocab_size = _vocab_size(rewards)
    host = any(on_host(r) for r in rewards)
    parts = tuple(compiled(r) for r in rewards) if host else rewards

    def read(params: Params) -> tuple[Sequence[Params], Array]:
        given = fields_of(params, WeightedSumParams)
        weights = at_least_float32(given.weights)
        if weights.shape != (len(rewards),) or len(given.rewards) != len(rewards):
            raise ValueError(
                f"weights: expected {len(rewards)} weights and as many params, found shape {weights.shape} "
                f"and {len(given.rewards)} params"
            )
        return given.rewards, weights

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        each, _ = read(params)  # its errors before those of the parts
        found = [call_reward(r, p, tokens, mask, prompt_length, index) for r, p in zip(parts, each, strict=True)]
        return add(params, jnp.stack(found), index)

    def add(params: Params, values: Array, index: TextIndex) -> RewardValues:
        weights, inside = read(params)[1], is_supported(values)
        # Log 0 stays log 0: less itself it would be 0, and times a weight below 0 the best of all rewards.
        outside = (~inside & (weights != 0)[:, None]).any(axis=0)
        return jnp.where(outside, NEGATIVE, jnp.tensordot(weights, jnp.where(inside, values, 0), axes=1))

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        each, weights = read(params)
        if is_concrete(weights) and not np.all(np.isfinite(np.asarray(weights))):
            raise ValueError(f"weights: expected finite numbers, found {np.asarray(weights)}")
        for i, (r, p) in enumerate(zip(rewards, each, strict=True)):
            run_check(_check_of(r), p, prompts, max_new_tokens, f"['rewards'][{i}]")

    kept = None if host else prefixes.combined_prefix(rewards, lambda params: read(params)[0], add)
    return CheckedReward(reward, check, vocab_size, kept, host)


def pool(rewards: Sequence[Reward], f: MemberPool) -> Reward:
    """Builds a function of several rewards, r = f(pool_params, r [N,m], index [N]).

    `jaxalign.pools` has functions for it: minimum, lower_bound, soft_minimum.

    Args:
      rewards: m >= 1 Rewards over one vocabulary.
      f: f(pool_params, r [N,m], index [N]) -> [N]. Defined once, it is traced once.

    Returns:
      A Reward with `PoolParams`.

    Raises:
      ValueError: no rewards, or vocabularies that differ; when it is used, params that are not one per reward, or an f
        that returns anything but one real number per text.
    """
    return _pool(_sequence(rewards), f)


@cached
def _pool(rewards: tuple[Reward, ...], f: MemberPool) -> Reward:
    if not rewards:
        raise ValueError("rewards: expected at least one reward, found none")
    check_function_argument("f", f)
    vocab_size = _vocab_size(rewards)
    host = any(on_host(r) for r in rewards)
    parts = tuple(compiled(r) for r in rewards) if host else rewards

    def read(params: Params) -> PoolParams:
        given = fields_of(params, PoolParams)
        if not isinstance(given.rewards, Sequence) or len(given.rewards) != len(rewards):
            found = len(given.rewards) if isinstance(given.rewards, Sequence) else type(given.rewards).__name__
            raise ParamsError(f"expected parameters of {len(rewards)} rewards, found {found}", "['rewards']")
        return given

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        each = read(params).rewards
        found = [call_reward(r, p, tokens, mask, prompt_length, index) for r, p in zip(parts, each, strict=True)]
        return together(params, jnp.stack(found), index)

    def together(params: Params, values: Array, index: TextIndex) -> RewardValues:
        return check_values(f(read(params).pool, values.T, index), values.shape[1:], function=f)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        for i, (r, p) in enumerate(zip(rewards, read(params).rewards, strict=True)):
            run_check(_check_of(r), p, prompts, max_new_tokens, f"['rewards'][{i}]")

    kept = None if host else prefixes.combined_prefix(rewards, lambda params: read(params).rewards, together)
    return CheckedReward(reward, check, vocab_size, kept, host)


@cached
def map_reward(reward: Reward, f: RewardMap) -> Reward:
    """Builds a function of a reward, r' = f(map_params, r, index).

    Scaling, clipping, calibration and shaping by per-prompt tables are such maps.

    Args:
      reward: the Reward below.
      f: f(map_params, r [N], index [N]) -> [N]. Defined once, it is traced once.

    Returns:
      A Reward with `MapParams`.

    Raises:
      ValueError: what is no Reward, an f that does not take these arguments; when it is used, f returns anything but
        one real number per text.
    """
    check_reward_argument("reward", reward)
    if not takes(f, 3):
        raise ValueError(f"f: expected a function (map_params, reward, index), found {described(f)}")
    return _mapped(reward, f, None)


def _mapped(reward: Reward, f: RewardMap, check_map: HostCheck | None) -> Reward:
    def read(params: Params) -> MapParams:
        return fields_of(params, MapParams)

    def apply(params: Params, value: Array, index: TextIndex) -> RewardValues:
        return check_values(f(read(params).map, value, index), value.shape, function=f)

    def mapped(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        return apply(params, call_reward(reward, read(params).reward, tokens, mask, prompt_length, index), index)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        given = read(params)
        run_check(check_map, given.map, prompts, max_new_tokens, "['map']")
        run_check(_check_of(reward), given.reward, prompts, max_new_tokens, "['reward']")

    host = on_host(reward)
    kept = None
    if not host:
        kept = prefixes.combined_prefix(
            [reward],
            lambda params: [read(params).reward],
            lambda params, values, index: apply(params, values[0], index),
        )
    return CheckedReward(mapped, check, _vocab_size([reward]), kept, host)


@cached
def calibrated(
    reward: Reward, *, transform: infalign.Transform | None = None, width: float | None = None, smooth: bool = False
) -> Reward:
    """Builds the calibrated reward Phi(C(x,y)): the reward's place among base samples of its prompt, in [0,1],
    transformed.

    Args:
      reward: the Reward below.
      transform: Phi, non-decreasing; None for C itself. One that is −inf at 0 (`infalign.log`) needs smooth.
      width, smooth: of `infalign.calibrate`.

    Returns:
      A Reward with `MapParams` whose map is `CalibratedParams`; the table is read at the prompt's index.

    Raises:
      ValueError: what is no Reward, a transform that decreases somewhere; when it is used, a table of another rank, of
        fewer than two samples, not ascending or not finite, or without a row for a prompt's index. Under jit an index
        outside the table and a row that is not ascending give NaN.

    Source: InfAlign, arXiv 2412.19792, eqs. 4 and 12.
    """
    check_reward_argument("reward", reward)
    if transform is not None:
        infalign.check_increasing(transform)

    def table_of(params: Params) -> ArrayLike:
        table = fields_of(params, CalibratedParams).table
        if np.ndim(table) != 2:
            raise ValueError(f"table: expected shape [prompts,K], found {np.shape(table)}")
        if np.shape(table)[1] < 2:
            raise ValueError(f"table: expected at least 2 samples of each prompt, found shape {np.shape(table)}")
        return table

    def place(params: Params, value: Array, index: TextIndex) -> RewardValues:
        rows = look_up(table_of(params), index, name="table")
        c = infalign.calibrate(value[:, None], reference=rows, width=width, smooth=smooth, is_sorted=True)[:, 0]
        return c if transform is None else check_values(transform(c), c.shape, function=transform)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        table = table_of(params)
        check_index("table", prompt_index(prompts), np.shape(table)[0])
        if is_concrete(table):
            values = np.asarray(table)
            if not np.isfinite(values).all():
                raise ValueError("table: expected finite rewards, found NaN or infinity")
            if (np.diff(values, axis=1) < 0).any():
                raise ValueError("table: expected ascending rewards in each row, found some that fall")

    return _mapped(reward, place, check)


@cached
def shaped(reward: Reward, *, sharpness: float | None = None) -> Reward:
    """Builds the Stackelberg-shaped reward by per-prompt thresholds m: bound·1[r > m], or
    bound·sigmoid(sharpness·(r − m)).

    Thresholds come from `shaping.optimal_threshold` on base samples. For best-of-n, `decoding.rejection` and training.

    Args:
      reward: the Reward below.
      sharpness: of the sigmoid [1/reward]; None for the step.

    Returns:
      A Reward with `MapParams` whose map is `ShapedParams`; thresholds are read at the prompt's index.

    Raises:
      ValueError: what is no Reward; when it is used, thresholds of another rank, NaN, or without a row for a prompt's
        index; a bound that is not one number > 0. Under jit an index outside the table gives NaN.

    Source: arXiv 2602.02572, theorem 1.
    """
    check_reward_argument("reward", reward)

    def read(params: Params) -> ShapedParams:
        given = fields_of(params, ShapedParams)
        if np.ndim(given.threshold) > 1:
            raise ValueError(f"threshold: expected shape [prompts] or one number, found {np.shape(given.threshold)}")
        if np.ndim(given.bound):
            raise ValueError(f"bound: expected one number, found shape {np.shape(given.bound)}")
        return given

    def shape(params: Params, value: Array, index: TextIndex) -> RewardValues:
        threshold, bound = read(params)
        if np.ndim(threshold):
            threshold = look_up(threshold, index, name="threshold")
        if sharpness is None:
            return shaping.threshold_reward(value[:, None], threshold=threshold, bound=bound)[:, 0]
        column = value[:, None]
        return shaping.soft_threshold_reward(column, threshold=threshold, bound=bound, sharpness=sharpness)[:, 0]

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        threshold, bound = read(params)
        if np.ndim(threshold):
            check_index("threshold", prompt_index(prompts), np.shape(threshold)[0])
        if is_concrete(threshold) and np.isnan(np.asarray(threshold)).any():
            raise ValueError("threshold: expected numbers, found NaN")
        if is_concrete(bound) and not np.asarray(bound) > 0:
            raise ValueError(f"bound: expected a value > 0, found {np.asarray(bound)}")

    return _mapped(reward, shape, check)
